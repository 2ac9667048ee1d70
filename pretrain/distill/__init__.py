"""Distillation while pretraining: the student learns from a frozen teacher as well as from the masked words.

recipe          the keys `distill` of a train recipe, and their checks
recording       models that keep the queries, keys and values of their layers
teacher         the teacher: an export of this project, or an encoder of Hugging Face
student         the model that is trained: its forward pass makes all losses
objective       what a training step calls
cache           a teacher's outputs on disk: what is kept, and which runs may use it
cache_shards    one shard of them
cache_maker     `sharebert cache-teacher`
cached_teacher  a teacher that reads them

The losses themselves are in exports/distill_losses.py, where fine-tuning uses them too.
"""
