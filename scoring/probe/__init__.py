"""Probes: what a linear classifier can read from each layer of a frozen model (Tenney et al., ICLR 2019).

words       rows of text without capitals and punctuation, and what was taken away as labels
vectors     a vector for each word, from each layer
regression  logistic regression on vectors of one layer, or on a learned mix of all layers
run         `sharebert evaluate --task probe`
"""
