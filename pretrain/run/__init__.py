"""The files of a run: its folder, its state, its metrics."""
