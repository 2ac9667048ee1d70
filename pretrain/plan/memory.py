"""The memory of a rank in a training step, part by part.

Model states are those of Rajbhandari et al. (SC 2020, section 3.1), with what DeepSpeed holds beside them. Activations
are the tensors that this project's own operations keep for the backward pass, counted from `sharebert.encoder`,
`sharebert.kernels` and `sharebert.kernels_cpu`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pretrain.flops import made_elements
from sharebert import ShareBertConfig
from sharebert.kernels import CHUNK_LOGITS

BUCKET_ELEMENTS = 2**23
"""As `pretrain.engine.config.BUCKET_ELEMENTS`, which needs DeepSpeed; a test compares the two."""

REUSE_LOSS = 0.5
"""Share of the activations for which the C allocator of a CPU finds no freed block in the next micro-batch. Fitted to
measurements of five shapes; `tests/pretrain/test_plan.py` holds three of them."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides the memory of a rank, beside the model."""

    parameters: int
    """Learned numbers of the model."""
    world_size: int
    """Ranks that share the states."""
    stage: int
    """ZeRO stage, 0 to 3."""
    precision: str
    """fp32, bf16 or fp16."""
    rows: int
    """Rows of a micro-batch."""
    seq_len: int
    """Tokens of a row."""
    masked: int
    """Masked tokens of a row."""
    recompute: bool = False
    """Whether the backward pass computes the layers again."""
    ema: bool = False
    """Whether the run keeps a moving average of the weights."""
    by_muon: int = 0
    """Learned numbers that Muon steps; AdamW steps the others."""
    generated_muon: bool = False
    """Whether gradients of generated matrices are made orthogonal."""
    cuda: bool = True
    """Whether the kernels for GPUs run. Those for CPUs keep masks of dropout and attention probabilities."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on a rank at the highest point of a step."""

    weights: int
    """Working weights, and fp32 masters where there are."""
    gradients: int
    """Gradients in the working precision, and their sums in fp32."""
    optimizer: int
    """First and second moment of Adam, Muon's momenta and sums, and the moving average of the weights."""
    generated: int
    """Generated matrices, and their gradients."""
    activations: int
    """What layers, embedding and head keep for the backward pass."""
    buffers: int
    """Buckets of DeepSpeed, and the largest one of: logits and decoder gradient while the loss is computed; the parts
    of the embedding's gradient at the end of the backward pass; the matrices that Muon gathers in a step."""
    allocator: int
    """On a CPU, freed blocks that the C allocator cannot use again; 0 on a GPU."""

    @property
    def states(self) -> int:
        """Weights, gradients and optimizer."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All parts."""
        return sum(asdict(self).values())


def state_bytes(shape: Shape, largest: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer on a rank.

    `largest` is the number of parameters of the largest module, which ZeRO 3 gathers: in 2 bytes, and its gradient.
    Stages 2 and 3 in half precision give what DeepSpeed's own `estimate_zero2_model_states_mem_needs` and
    `estimate_zero3_model_states_mem_needs` give.
    """
    parameters, ranks, stage = shape.parameters, shape.world_size, shape.stage
    part = -(-parameters // ranks)
    optimizer = (8 + 4 * shape.ema) * parameters - 4 * shape.by_muon
    if stage == 0:
        return {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer": optimizer}
    working = 4 if shape.precision == "fp32" else 2
    weights = (working * parameters if stage < 3 else working * (part + largest)) + 4 * part
    sums = 4 * (parameters if stage == 1 else part)
    gradients = sums + working * (largest if stage == 3 else sums // 4)
    return {"weights": weights, "gradients": gradients, "optimizer": -(-optimizer // ranks)}


def activation_bytes(config: ShareBertConfig, shape: Shape) -> int:
    """Bytes that layers, embedding and head keep from the forward to the backward pass."""
    hidden, inner, heads = config.hidden_size, config.inner_size, config.heads
    product = 4 if shape.precision == "fp32" else 2
    stream = 4 if shape.stage == 0 else product  # under autocast LayerNorms and additions are in fp32
    tokens = shape.rows * shape.seq_len
    layer = 2 * stream * hidden + 6 * product * hidden + 2 * product * inner
    if config.learned_branch_gains:
        layer += 2 * product * hidden  # both branches before their gains
    if shape.cuda:
        layer += 4 * heads  # log-sum-exp of each head
    else:
        dropout, of_attention = config.hidden_dropout_prob > 0, config.attention_probs_dropout_prob > 0
        layer += 2 * hidden * dropout + (5 * heads * shape.seq_len if of_attention else 4 * heads)
    layers = config.num_hidden_layers * layer
    if shape.recompute:
        layers = config.num_hidden_layers * (stream + product) * hidden + layer
    factor = config.factor_size if config.sharing == "veps" else 0
    ends = (2 * stream + product) * (factor + hidden) + stream * hidden
    head = (2 * product + 2 * stream + 4) * (config.factor_size if config.mlm_head == "tied" else hidden)
    return tokens * (layers + ends) + shape.rows * shape.masked * (head + product * hidden)


def loss_bytes(config: ShareBertConfig, shape: Shape) -> int:
    """Bytes of the logits of a chunk, of their temporaries, and of the decoder's gradient, which is in fp32."""
    product = 4 if shape.precision == "fp32" else 2
    chunk = min(CHUNK_LOGITS["cuda" if shape.cuda else "cpu"], shape.rows * shape.masked * config.vocab_size)
    logits = product * chunk
    if not shape.cuda:  # the plain loss: a copy in fp32 in half precision, exponentials, and the cast back
        logits += 4 * chunk + (4 + product) * chunk * (product == 2)
    width = config.factor_size if config.mlm_head == "tied" else config.hidden_size
    decoder = config.vocab_size * width
    gradient = 4 * decoder + (product * decoder if product == 2 else 0)
    return logits + gradient


def embedding_gradient_bytes(config: ShareBertConfig, shape: Shape) -> int:
    """Bytes of the gradient of E [V, F] at the end of the backward pass: one of the rows looked up, one of the
    generated matrices, and one of a tied head, which autograd then adds up."""
    weight = 4 if shape.stage == 0 or shape.precision == "fp32" else 2
    return (2 + (config.mlm_head == "tied")) * weight * config.vocab_size * config.factor_size


def hole_bytes(config: ShareBertConfig, shape: Shape, activations: int) -> int:
    """Bytes that the C allocator of a CPU holds beyond what is in use.

    glibc cannot fill the hole of a freed aligned block with one of the same size. A layer frees what its two blocks add
    to the stream and, with dropout, the same after dropout and the random numbers (2 bytes an element).
    """
    if shape.cuda:
        return 0
    product = 4 if shape.precision == "fp32" else 2
    stream = 4 if shape.stage == 0 else product
    hidden, heads = config.hidden_size, config.heads
    layer = 2 * product * hidden
    if config.hidden_dropout_prob:
        layer += 2 * (stream + 2) * hidden
    if config.attention_probs_dropout_prob:
        layer += 2 * heads * shape.seq_len
    layers = 1 if shape.recompute else config.num_hidden_layers
    return layers * layer * shape.rows * shape.seq_len + round(REUSE_LOSS * activations)


def memory(config: ShareBertConfig, shape: Shape) -> Memory:
    """The memory of a rank, part by part."""
    width = config.factor_size if config.mlm_head == "tied" else config.hidden_size
    largest = config.vocab_size * max(width, config.factor_size)
    product = 4 if shape.precision == "fp32" else 2
    buckets = 4 * min(shape.parameters, BUCKET_ELEMENTS) if shape.stage else 0
    activations = activation_bytes(config, shape)
    late = embedding_gradient_bytes(config, shape) - activations  # by then the activations are freed
    gathered = 4 * shape.by_muon - activations if shape.stage else 0  # in the step, as late
    states = state_bytes(shape, largest)
    if shape.generated_muon:
        states["optimizer"] += 8 * made_elements(config)
    return Memory(
        **states,
        generated=2 * product * made_elements(config),
        activations=activations,
        buffers=buckets + max(loss_bytes(config, shape), late, gathered),
        allocator=hole_bytes(config, shape, activations),
    )
