"""Which documents stay: cleaning, deduplication, decontamination."""
