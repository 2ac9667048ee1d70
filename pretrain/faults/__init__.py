"""What is done about faults of a training.

recipe         the key `faults` of a recipe
skipping       steps that are not finite: skip them, return to a checkpoint, skip their rows
detection      spikes of the loss and slow ranks, which are reported
watchdog       a rank that hangs ends the attempt, with the stacks of all ranks
guard          a small process beside a rank, which ends it when no Python code runs in it any more
memory_probe   a trial step, so that a lack of memory shows at the start
shard_check    checksums of the shards, compared while the training runs
stop           requests to stop: signals, and the file `stop` of a run
"""
