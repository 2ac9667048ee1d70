"""ShareBERT."""
