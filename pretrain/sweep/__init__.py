"""Experiments: many trainings that differ in some keys, and the table that compares them. `sharebert sweep`.

recipe     what is varied: arms, grid and seeds, and the trials that they make
runner     trains the trials one after another; goes on after a kill
table      the table, computed from the files of the runs alone
hparams    the same for TensorBoard's HPARAMS page
summary    writes both into the sweep's folder
"""
