"""The files of a run, and what is measured.

folder        what lies where in a run, who may write it, and its state
metric_log    what a run logs, through:
event_file    TensorBoard
look          what the model says and how its weights lie, at a validation, with:
draw          small pictures
goodput       the share of the time since the first attempt that steps took
profiles      traces of single steps
introduction  the first line of a run
terminal      a progress bar, or lines
meter         sums over the steps of a logging interval
environment   what each attempt ran on
"""
