"""Steps from export to export that make a model smaller: `sharebert compress`.

step.py    the protocol of a step, and what it is given
"""
