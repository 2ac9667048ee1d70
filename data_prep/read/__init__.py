"""From paths, URLs and names on the Hugging Face hub to documents.

find         the files that a path, folder, glob or URL names
sources      the inputs of a recipe, and their division into parts
compression  compressed files, told by their first bytes
encodings    encodings other than UTF-8: recognised, or read
streams      the bytes of a file, decompressed and as UTF-8
tables       columns of text in parquet files and hub datasets
documents    the documents of a part
"""
