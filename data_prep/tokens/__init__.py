"""From documents to rows of tokens.

tokenizer  train a vocabulary, or load one and check it
inference  correct a tokenizer that would give other ids at inference than in training rows
encode     token ids of documents
shuffle    a random order of all documents, in two passes on disk
pack       rows of a fixed length
"""
