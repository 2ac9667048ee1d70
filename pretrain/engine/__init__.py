"""DeepSpeed behind one typed class. Nothing outside this folder touches a private name of DeepSpeed.

engine              the model with its optimizer: forward, backward, step, state
config              precision, ZeRO and batch sizes as DeepSpeed's keys
optimizer           the optimizer's settings, and the learning rate of a step
parameter_groups    parameters that share a learning rate, decay and clip; how rates follow the width
grouped_adamw       AdamW by such groups, and Muon for matrices that are parameters
muon                what a recipe says about Muon, and its iteration
ema                 the moving average of the weights
numerics            how CUDA rounds, and whether it repeats itself
fragments           which elements of weights and moments this rank holds, at every ZeRO stage
generated_muon      orthogonal gradients of generated matrices, and their momenta
loss_scaler         fp16's dynamic loss scale
deepspeed_import    importing DeepSpeed without its side effects
zeros               training of pruned weights: those that are zero stay zero
fake_quantise       quantisation-aware training: the forward pass of rounded matrices
"""
