"""From a dataset's rows to the masked micro-batches of an optimizer step.

datasets   what a run reads: the recipe's key `data`, checked and opened
loader     the steps of one rank, prepared ahead by a thread
mixture    position in the run → which dataset
order      position in a dataset's epochs → which row
mask_schedule   step → mask rate, and shares of [MASK], random and kept tokens
row_length   step → tokens of a row
masks      row → which tokens are masked, and what stands in their place
batches    rows → micro-batches of a fixed shape
"""
