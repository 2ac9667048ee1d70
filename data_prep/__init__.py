"""`sharebert prep`: from text to a dataset.

read/     find the input files and read documents from them
filter/   leave documents out: cleaning rules, duplicates, overlap with evaluation sets
tokens/   from documents to rows of tokens: tokenizer, encode, shuffle, pack
shards/   the dataset on disk, which training reads
recipe    the keys of the recipe
pipeline  the command as a whole: plan, stages, merge
job       the plan: inputs, parts, vocabulary, work folder
stages    scan, dedup, encode and pack
parts     run the parts of a stage on all cores
merge     the last step: from finished parts to a dataset
report    what was read, left out and made, for people
progress  the bar or the lines of progress
disk      write arrays, and make files survive a power cut
lock      one prep at a time in an output folder
"""
