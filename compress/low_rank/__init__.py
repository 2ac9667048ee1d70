"""Steps that replace matrices by products of smaller ones.

step          `low_rank`: the matrices that layers share as products, and its keys
ranks         ranks of some matrices, by patterns of their names
svd           the product that is nearest on calibration rows
pc_lora_step  `pc_lora`: products that learn while the matrices fade out, and its keys
fading        matrices that fade out
fading_linears    linear layers of an encoder of Hugging Face that fade out
factor_step   `lower_factor`: fewer columns of E, and its keys
factor        the product that costs least
"""
