"""Steps for models whose matrices are written out: ONNX and dense.

to_onnx.py    step `onnx`: a compact export → an ONNX file in fp32
onnx_int8.py  step `onnx_int8`: products in int8, and the search for products that must stay in fp32
smooth.py     moves large activations into the matrices behind a LayerNorm (SmoothQuant), in an ONNX graph
runtime.py    runs an ONNX folder
"""
