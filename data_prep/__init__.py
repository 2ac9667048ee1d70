"""Text → dataset: read, clean, deduplicate, encode, shuffle, pack into rows, write shards."""
