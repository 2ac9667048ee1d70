"""Distillation while pretraining: the student learns from a frozen teacher as well as from the masked words.

recipe     the keys `distill` of a train recipe, and their checks
losses     the losses, as sums over positions
recording  models that keep the queries, keys and values of their layers
teacher    the teacher: an export of this project, or an encoder of Hugging Face
student    the model that is trained: its forward pass makes all losses
objective  what a training step calls
"""
