"""Fine-tuning and scoring of encoders on GLUE-style tasks, and zero-shot scores on BLiMP: `sharebert evaluate`.

recipe        the keys of `evaluate`
tasks         the nine tasks of GLUE, and tasks that a recipe describes
tables        columns of text, with the place of each row, and what happens to bad rows
table_files   files of labelled rows (tsv, csv, parquet, jsonl) as tables
labels        labels as numbers
data          a task with its splits, from files or from the hub
architecture  what kind of model a folder holds, what it takes as input, and its dropout rates
fake_quantise a classifier that is fine-tuned with the weights of its quantised export
encoders      encoders that can be fine-tuned: ShareBERT exports and Hugging Face folders
classifier    a fine-tuned encoder, and its predictions
lora          updates of a low rank, trained in place of all weights
finetune      one fine-tuning
trial         an encoder on a task: the learning-rate sweep, then all seeds
baselines     models without an encoder: the majority class, and TF-IDF
metrics       GLUE's metrics
distill       fine-tuning with a teacher, and further train rows
probe         linear probes on the layers of a frozen model
blimp         BLiMP: pseudo-log-likelihoods of pairs of sentences
report        results as JSON, a table in Markdown, curves in TensorBoard
score         the whole command: models one after the other, on the same rows
"""
