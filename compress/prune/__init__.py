"""Steps that remove parts of a model, or set weights to zero.

structure_step   `prune_structure`: fewer heads, columns and layers, and its keys
structure        which of them matter, by squared gradients; the factors on what stays
weights_step     `prune_weights`: weights of E and W_all become zero, and its keys
masks            which weights go, by their scores
surgeon          Optimal BERT Surgeon: scores from gradients, and how other weights make up
hidden_step      `prune_hidden`: a smaller hidden size of a dense model, and its keys
directions       which directions of the residual stream stay: principal ones (SP3), or channels
dense_parts      which heads, columns and channels of a dense model matter
dense_slices     a dense model → a smaller one
reconstruct      its matrices anew, by least squares
calibrate        the forward pass on calibration rows, with masks on parts
"""
