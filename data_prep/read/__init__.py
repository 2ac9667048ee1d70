"""From paths, URLs and names on the Hugging Face hub to documents.

find       the files that a path, folder, glob or URL names
sources    the inputs of a recipe, and their division into parts
streams    the decompressed bytes of a file
tables     columns of text in parquet files and hub datasets
documents  the documents of a part
"""
