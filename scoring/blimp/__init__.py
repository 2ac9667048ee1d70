"""BLiMP: does a masked language model prefer the acceptable sentence of a pair? It is scored without fine-tuning.

pairs       the pairs of each paradigm, from files or from the hub
masked_lm   masked language models: ShareBERT exports and Hugging Face folders
likelihood  the pseudo-log-likelihood of sentences
run         `sharebert evaluate --task blimp`: paradigms one after the other, resumable
"""
