"""ShareBERT in plain PyTorch. The `*.py` files of this folder, and no others, travel with every export.

config              the keys of a model's `config.json`, and their checks
encoder             layers and encoder: tokens to hidden states
sharing             which matrices each layer uses
kept                generated matrices that evaluation keeps between forward passes
slices              the parts of the generated matrices that a pruned model uses
sparse              tensors that are stored without their zeros
packed              tensors as few bits a number
stored              the tensors that a trimmed export stores, and all tensors
virtual             the virtual embedding matrix, and the matrices cut from it
heads               the head for masked language modelling, and the model that is pretrained
roles               whether weight decay acts on a parameter, and how the parameter starts
init                the start of a new model from a seed
kernels             the fused operations: one interface, and its reference in PyTorch
shared_linear       x·W + b for a matrix that several layers share
precision           the dtypes of products and sums
plain_modules       whether a tool (adapter, quantiser, offloading) has changed a module, which then must be called
tracing             whether a compiler or an exporter records the model
kernels_cpu         dropout, and attention with dropout, for CPUs
kernels_flex        attention within documents on CUDA
kernels_triton_*    on CUDA: dropout + addition + LayerNorm (norm), bias + GELU (gelu), cross-entropy (loss), and
                    matrices cut from the virtual matrix (slab)
hub                 the classes for transformers; the only file that imports it
"""

from .config import SIZES, ShareBertConfig, ShareBertError
from .encoder import Encoded, ShareBert
from .heads import MlmOutput, ShareBertForMaskedLM
from .init import initialize
from .roles import Role, parameter_roles

__all__ = [
    "SIZES",
    "Encoded",
    "MlmOutput",
    "Role",
    "ShareBert",
    "ShareBertConfig",
    "ShareBertError",
    "ShareBertForMaskedLM",
    "initialize",
    "parameter_roles",
]
