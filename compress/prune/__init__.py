"""Steps that remove parts of a model, or set weights to zero.

structure_step   `prune_structure`: fewer heads, columns and layers, and its keys
structure        which of them matter, by squared gradients; the factors on what stays
latency_step     `prune_to_latency`: parts go until a target time is reached, and its keys
latency_table    measured times of some shapes, and what they predict for others
structure_search the parts that stay within a target, by squared gradients
hard_concrete    random gates that are exactly 0 or 1, and have gradients
gate_training    the training of such gates on heads, columns and layers
weights_step     `prune_weights`: weights become zero, and its keys
prunable         what it asks of a model
prunable_encoder the same of a dense export, or an encoder of Hugging Face
masks            which weights go, by their scores
surgeon          Optimal BERT Surgeon: scores from gradients, and how other weights make up
movement         movement pruning: scores from where a training moves weights
hidden_step      `prune_hidden`: a smaller hidden size of a dense model, and its keys
directions       which directions of the residual stream stay: principal ones (SP3), or channels
dense_parts      which heads, columns and channels of a dense model matter
dense_slices     a dense model → a smaller one
reconstruct      its matrices anew, by least squares
amount           how much of a kind of part stays
"""
