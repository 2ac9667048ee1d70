"""Steps from export to export that make a model smaller: `sharebert compress`.

step.py    the protocol of a step, and what it is given
dense/     steps for models whose matrices are written out: ONNX and dense
"""
