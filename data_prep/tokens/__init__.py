"""From documents to rows of tokens: tokenizer, encoding, shuffling, packing."""
