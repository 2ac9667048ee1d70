"""The first hour on a GPU: what decides whether this project is right and fast there, in one command.

    make gpu                                    or: python -m benchmarks.gpu [--only kernels,engine] [--out FOLDER]
    python -m benchmarks.gpu --rehearse         the same code path on a CPU, at tiny sizes

A bare machine with torch, triton, transformers, safetensors and tensorboard, and no network, needs the wheels that
`make gpu-wheels` gathers. Each stage is a process of its own, and ends within its minutes whatever happens in it.

__main__.py    the stages, one after the other; the table and results.json
timing.py      the time of a call, by CUDA events
kernels.py     are the kernels right, and how near to the memory's bandwidth? Which attention runs?
training.py    real trainings: ZeRO stages, micro-batches, options, a stop and a resume
peers.py       BertForMaskedLM and nn.TransformerEncoderLayer at the same sizes
profile.py     where the time of a step goes
dataset.py     rows of random words to train on
wheels.py      gathers what a bare machine lacks
"""
