"""The dataset on disk, format 1. This folder imports nothing else of data_prep, so a trainer can use it alone.

format         names of the files, the manifest, the fingerprint, and checks of both
shard_file     one shard: a tar of blocks of rows, written once and mapped into memory to be read
dataset_files  where the files come from: the interface, and a local folder
cache          copies on the node's own disk, which its processes share
reader         open a dataset and read rows
"""
