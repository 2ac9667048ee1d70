"""From a dataset to a run to an export. Read train.py first.

train         the training loop
recipe        the keys of a recipe, and what they resolve to
objective     what turns a micro-batch into a loss
validate      loss and accuracy on held-out rows
model         which model is trained, and how it starts
plan          what a run will cost
flops         FLOPs of a step, and the peaks of devices
distributed   which rank this process is, and a few collectives

data/         rows → masked micro-batches
engine/       the model under DeepSpeed
checkpoint/   saving and resuming
faults/       what is done about everything that goes wrong
run/          the files of a run, and what is measured
export/       checkpoint → export
"""
