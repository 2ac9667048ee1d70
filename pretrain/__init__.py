"""Pretraining: a dataset becomes a run (checkpoints, TensorBoard, log), and a run becomes an export."""
