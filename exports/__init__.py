"""What training ends in and every later stage takes: an export as a value, its forms, its files and its card.

export.py                `Export`, the value: config, kind, weights, tokenizer, card sections, provenance
kinds.py                 what a model is for: masked language modelling, an encoder alone, a classifier
weight_source.py         where weights are read from, a piece at a time
forms.py                 the protocol of a form, the table of forms, and the one write
compact.py               the form with the learned parameters and the code of the model
dense.py                 the form that plain transformers loads as `megatron_bert`
dense_model.py           the dense model itself, and its tensors computed from the compact ones
packed.py                the compact form with tensors packed into a few bits a number
fake_quantise.py         the weights of a quantised export in a forward pass that is trained
hub_weights.py           weights of folders of Hugging Face: all that the config asks for
bert_attention.py        queries, keys and values of a BERT of transformers, which does not return them
distill_losses.py        the losses between a student and its teacher
rounding.py              numbers → the nearest codes of a packed tensor
onnx.py                  the form for ONNX Runtime
onnx_graph.py            what an ONNX graph needs after torch's exporter made it
read.py                  an export in the compact form → its value, its config, its model
files.py                 the names of an export's files
cards.py                 the model card of each form
tokenizer.py             the tokenizer files of an export
weight_files.py          safetensors files of any size, with checksums, written in a stream
tensor_file.py           the byte layout of a safetensors file
meta_device.py           models without values
authors.py               the authors' checkpoints → an export
fill.py                  the likeliest words for each [MASK] of a text
"""
