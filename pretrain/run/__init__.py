"""The files of a run.

folder       the run directory, its lock and its state
metric_log   TensorBoard, log.jsonl and the progress on the terminal
meter        measures loss, speed and memory between two lines of the log
environment  what an attempt ran on
"""
