"""Steps that remove parts of a model, or set weights to zero.

structure_step   `prune_structure`: fewer heads, columns and layers, and its keys
structure        which of them matter, by squared gradients; the factors on what stays
calibrate        the forward pass on calibration rows, with masks on parts
"""
