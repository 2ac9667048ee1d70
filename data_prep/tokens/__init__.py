"""From documents to rows of tokens.

tokenizer  train a vocabulary, or load one and check it
encode     token ids of documents
shuffle    a random order of all documents, in two passes on disk
pack       rows of a fixed length
"""
