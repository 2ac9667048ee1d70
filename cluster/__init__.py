"""Starts stages on SLURM as commands, and keeps them alive. It imports no stage.

recipe      the cluster recipe: what to ask SLURM for
submit      makes jobs of trainings and of `sharebert prep`, through submitit
launch      what a job runs, and the torchrun command of a node
agent       runs on each node of a training: torchrun, signals, how the attempt ended
prep        runs a task of `sharebert prep`
requeue     whether a job that ended is requeued: lines of the batch script
allocation  which node of which attempt of which job an agent runs on
preflight   checks before each attempt
node_facts  what must be the same on every node
collective  checks each device and an all-reduce, under torchrun
processes   a command that an agent runs, its children, their end
folder      RUN/cluster: submissions, attempts, requests to stop
scheduler   what SLURM knows about a job
status      `sharebert status` and `sharebert stop`
logs        `sharebert logs`
"""
