"""What a run will cost, before it runs.

estimate   all numbers of a plan: parameters, memory, speed, network, price
memory     the memory of a rank, part by part
text       a plan as text, and as a table of several GPUs
command    what `sharebert plan` prints
trial      steps of a recipe on random rows, in a fresh process
measure    such steps on this machine, to hold a plan against
fit        the largest micro-batch that fits, for `data.micro_batch: auto`
gpus       the data sheets of GPUs
tables     the tables of docs/performance.md
roofline   the time of a micro-batch, part by part, at stated shares of a GPU's peaks
"""
