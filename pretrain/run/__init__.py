"""The files of a run, and what is measured.

folder        what lies where in a run, who may write it, and its state
metric_log    what a run logs, through:
event_file    TensorBoard
terminal      a progress bar, or lines
meter         sums over the steps of a logging interval
environment   what each attempt ran on
"""
