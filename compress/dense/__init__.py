"""Steps for models whose matrices are written out: ONNX and dense.

to_dense.py   step `dense`: a compact export → a dense one
awq.py        step `awq`: the matrices of a dense model's layers in a few bits, by what calibration rows say
awq_search.py     factors of channels and clips of groups
pack_quantised.py the file of that step's result, in compressed-tensors' layout
to_onnx.py    step `onnx`: a model → an ONNX file in fp32
hub_onnx.py   any BERT-like encoder of Hugging Face → an ONNX file
onnx_int8.py  step `onnx_int8`: products in int8, and the search for products that must stay in fp32
smooth.py     moves large activations into the matrices behind a LayerNorm (SmoothQuant), in an ONNX graph
runtime.py    runs an ONNX folder
"""
