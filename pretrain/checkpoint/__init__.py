"""Checkpoints: written in the background, found, verified and read.

format           format 1 on disk: manifest, checksums, fragments, for any ZeRO stage and world size
writer           copies the state and writes it in the background, with retries
saving           one rank's part of one checkpoint, in steps that can be tried again
retention        which checkpoints are deleted, and when
training_state   what a training saves and loads: fragments, counters, rows, generators
identity         what may change between two attempts of a run, and what may not
rng_state        the state of the random generators
direct_io        writes of large files past the page cache
"""
