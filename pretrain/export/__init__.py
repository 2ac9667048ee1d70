"""From the checkpoints of a run to an export.

consolidate.py          the newest whole checkpoint of a training → an export in any form
checkpoint_weights.py   the fp32 master weights in a checkpoint, read a piece at a time
deepspeed_folders.py    the same for a folder that DeepSpeed itself saved
run_card.py             what the model card says about the run
"""
