"""DeepSpeed behind one typed class; nothing outside this folder touches its private names."""
