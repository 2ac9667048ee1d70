"""Checkpoint format 1: written in the background, found, verified and read."""
