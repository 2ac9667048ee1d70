"""Fine-tuning with a teacher that was fine-tuned on the task.

teacher   the teacher: its scores for all train rows, and its layers' outputs for a batch
lesson    the loss of one student in a step
watch     the attention scores of a classifier, before softmax
augment   further train rows: copies in which a masked language model replaced words

The losses themselves are in exports/distill_losses.py.
"""
