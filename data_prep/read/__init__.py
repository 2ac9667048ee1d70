"""From paths, URLs and hub names to documents."""
