"""From a dataset to a run to an export. Read train.py first.

train         the training loop
recipe        the keys of a recipe, and what they resolve to
objective     what turns a micro-batch into a loss
validate      loss and accuracy on held-out rows
model         which model is trained, and how it starts
flops         FLOPs of a step, and the peak of a device
distributed   which rank this process is, and a few collectives

plan/         what a run will cost
data/         rows → masked micro-batches
distill/      learning from a teacher
engine/       the model under DeepSpeed
checkpoint/   saving and resuming
faults/       what is done about everything that goes wrong
run/          the files of a run, and what is measured
report/       one page of what happened in a run
export/       checkpoint → export
sweep/        experiments: many trainings and the table that compares them
"""
