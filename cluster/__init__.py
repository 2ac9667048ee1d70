"""Starts stages on SLURM, as commands, and keeps them alive: submit, agents, requeue, status."""
