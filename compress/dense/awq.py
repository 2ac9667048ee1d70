"""Step `awq`: the matrices of a dense model's layers in a few bits a number, by what calibration rows say.

Layer by layer, as llm-awq does it: a layer's input is that of the model in fp32. Factors of input channels (see
`awq_search.py`) go where something takes up 1/s exactly: into the LayerNorm before query, key and value and before the
first matrix of the feed-forward block, if nothing else reads that norm (pre-LN, as a dense export), and into the value
matrix before the attention output. In a post-LN model such as BERT the residual stream reads the norms too, so that
only the last one applies. The ranges of groups are searched for all matrices but query and key.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from compress.dense.awq_search import Grid, best_clips, best_factors, output_error, rounded
from compress.dense.pack_quantised import quantization_config, stored
from compress.source import WEIGHTS, config_of, copy_model, open_hub_model
from compress.step import FormName, NeedsNoRows, Source, Tools
from exports.files import CARD, CONFIG, write_json
from exports.weight_files import read_metadata, read_weights, write_weights
from exports.weight_source import TensorWeights
from sharebert.config import ShareBertConfig
from sharebert_common.errors import BadInput
from sharebert_common.recipe import STRICT

ROWS_AT_ONCE = 16
"""Calibration rows that go through a layer together."""

MODEL_TYPES = ("bert", "megatron-bert")
"""Architectures of which it is known what reads each LayerNorm."""

TARGETS = [r"re:.*encoder\.layer\.\d+\..*(query|key|value|dense)$"]


@dataclass(config=STRICT, kw_only=True, frozen=True)
class Awq(NeedsNoRows):
    """The matrices of all layers in a few bits a number, of a dense export or a BERT of Hugging Face; activation-aware.

    The result is in compressed-tensors' layout: transformers loads it where that package is installed.
    """

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    """Bits of a number."""
    group: Annotated[int, Field(ge=32, multiple_of=32)] = 128
    """Neighbours of a row that share a scale; it must divide the inputs of every matrix."""
    scale: bool = True
    """Scale input channels by what is multiplied with them, where it can be done exactly."""
    clip: bool = True
    """Search for the range of each group with the least error of the output."""
    rest: Literal["fp32", "fp16"] = "fp16"
    """How all other tensors, such as embeddings, are stored."""
    rows: Annotated[int, Field(ge=1)] = 128
    """Calibration rows that are used, at most."""

    @property
    def needs_calibration(self) -> bool:
        """See `Step.needs_calibration`."""
        return self.scale or self.clip

    @property
    def grid(self) -> Grid:
        """How matrices are rounded."""
        return Grid(self.bits, self.group)

    def check(self, source: Source) -> None:
        """See `Step.check`."""
        self.check_ahead(source.form, None)
        config = config_of(source.folder)
        if config["model_type"] not in MODEL_TYPES:
            raise BadInput(f"awq: takes the model types {', '.join(MODEL_TYPES)}, this one is {config['model_type']}")
        if "quantization_config" in config:
            raise BadInput(f"awq: {source.folder} is quantised already")
        for key in ("hidden_size", "intermediate_size"):
            self.check_group(key, config[key])

    def check_ahead(self, form: FormName, config: ShareBertConfig | None) -> None:
        """See `Step.check_ahead`."""
        self.result_form(form)
        try:
            import compressed_tensors  # noqa: F401
        except ImportError as error:
            raise BadInput("awq needs one more package: pip install compressed-tensors") from error
        if config is not None:
            self.check_group("hidden_size", config.hidden_size)  # columns may go in a step that chooses their number

    def check_group(self, key: str, size: int) -> None:
        """Raise BadInput where groups do not fill a row of a model's matrices."""
        if size % self.group:
            raise BadInput(f"awq.group: {self.group} does not divide {key}, which is {size}")

    def result_config(self, config: ShareBertConfig) -> ShareBertConfig:
        """See `Step.result_config`."""
        return config

    def result_form(self, source: FormName) -> FormName:
        """See `Step.result_form`."""
        if source not in ("dense", "hub"):
            raise BadInput(f"awq: takes a dense export or a BERT of Hugging Face, this one is {source}")
        return source

    def apply(self, source: Source, tools: Tools, out: Path) -> dict[str, Any]:
        """See `Step.apply`."""
        model = open_hub_model(source.folder)
        tokens = tools.calibration()[: self.rows] if self.needs_calibration else None
        matrices: dict[str, dict[str, Tensor]] = {}
        errors: list[tuple[float, float]] = []
        alphas: dict[str, float] = {}
        with torch.no_grad():
            for number, (layer, inputs) in enumerate(layers_with_inputs(model, tokens)):
                prefix = f"encoder.layer.{number}."
                moments = moments_of(layer, inputs) if inputs else {}
                before = {name: module.weight.clone() for name, module in linears(layer)}
                if self.scale:
                    found = scale_layer(layer, moments, self.grid)
                    alphas |= {prefix + name: alpha for name, alpha in found.items()}
                for name, module in linears(layer):
                    clip = None
                    if self.clip and not name.endswith((".query", ".key")):
                        clip = best_clips(module.weight, moments[name].products, self.grid)
                    codes = rounded(module.weight, self.grid, clip)
                    matrices[prefix + name] = stored(prefix + name, codes, self.grid)
                    if moments:
                        plain = rounded(before[name], self.grid).values()
                        part = moments[name]
                        errors.append(
                            (
                                output_error(module.weight, codes.values(), part.products),
                                output_error(before[name], plain, part.unscaled),
                            )
                        )
                tools.say(f"awq: layer {number + 1} of {len(model.encoder.layer)}")
        self._write(source.folder, model, matrices, out)
        said: dict[str, Any] = {"matrices": len(matrices)} | ({"alphas": alphas} if alphas else {})
        if errors:
            said["output error, of that of plain rounding"] = sum(e for e, _ in errors) / sum(p for _, p in errors)
        return said

    def _write(self, folder: Path, model: Any, matrices: dict[str, dict[str, Tensor]], out: Path) -> None:
        """Write the model: its own tensors under their names in `folder`, with those of `matrices` packed."""
        given, now = read_weights(folder), dict(model.state_dict())
        head = f"{model.base_model_prefix}."
        tensors: dict[str, Tensor] = {}
        for name, tensor in given.items():
            plain = name.removeprefix(head)
            module = plain.removesuffix(".weight")
            if module in matrices and plain.endswith(".weight"):
                start = name.removesuffix(plain)
                tensors |= {start + part: value for part, value in matrices[module].items()}
            else:
                value = now.get(plain, tensor)
                half = self.rest == "fp16" and value.is_floating_point()
                tensors[name] = self._half(folder, name, value) if half else value
        copy_model(folder, out, *WEIGHTS)
        write_weights(out, TensorWeights(tensors), read_metadata(folder))
        config = config_of(folder) | {"quantization_config": quantization_config(TARGETS, self.grid)}
        write_json(out / CONFIG, config | {"dtype": "float16" if self.rest == "fp16" else "float32"})
        if (out / CARD).is_file():
            text = (out / CARD).read_text(encoding="utf-8")
            (out / CARD).write_text(text.rstrip() + CARD_SECTION.format(bits=self.bits, group=self.group), "utf-8")

    @staticmethod
    def _half(folder: Path, name: str, value: Tensor) -> Tensor:
        half = value.half()
        if not half.isfinite().all():
            raise BadInput(f"{folder}: {name} has numbers above the range of float16; use awq.rest: fp32")
        return half


CARD_SECTION = """

## Quantised

The matrices of all layers are in {bits} bits a number, with a scale for each {group} numbers, by activation-aware
quantisation (AWQ), in the layout of compressed-tensors: `pip install compressed-tensors`, then load the folder with
transformers as before.
"""


class Moments(NamedTuple):
    """What calibration rows say of the input X of a product."""

    means: Tensor
    """mean|X| of each channel, [in]."""
    products: Tensor
    """XᵀX [in, in], of the input as it is after factors were folded."""
    unscaled: Tensor
    """XᵀX [in, in], of the input before."""


def linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The products of a layer by name."""
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


class _FirstLayer(Exception):
    """The arguments of the first layer are known."""


def layers_with_inputs(model: Any, tokens: Tensor | None) -> Iterator[tuple[nn.Module, list[Any]]]:
    """Each layer with the arguments of its calls for all rows of `tokens` [N, T], in fp32; a layer may be changed.

    Yields (layer, [(arguments, keywords, mask of real tokens), …]); an empty list without tokens.
    """
    calls: list[Any] = []
    pad = int(model.config.pad_token_id or 0)
    layers = list(model.encoder.layer)

    def catch(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append([given, named])
        raise _FirstLayer

    hook = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for rows in () if tokens is None else tokens.split(ROWS_AT_ONCE):
        real = rows != pad
        try:
            model(input_ids=rows, attention_mask=real.long())
        except _FirstLayer:
            calls[-1].append(real)
    hook.remove()
    for layer in layers:
        following = [layer(*given, **named) for given, named, _ in calls]
        yield layer, calls
        for call, output in zip(calls, following, strict=True):
            hidden = output[0] if isinstance(output, tuple) else output
            call[0] = (hidden, *call[0][1:])


def moments_of(layer: nn.Module, calls: list[Any]) -> dict[str, Moments]:
    """The moments of the inputs of a layer's products, over real tokens. Query, key and value share theirs."""
    sums: dict[str, list[Tensor]] = {}
    masks: list[Tensor] = []

    def watch(name: str) -> Any:
        def add(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0][masks[-1]].float()
            found = [x.abs().sum(0).double(), (x.t() @ x).double(), torch.tensor(len(x))]
            sums[name] = [a + b for a, b in zip(sums[name], found, strict=True)] if name in sums else found

        return add

    watched = [(name, module) for name, module in linears(layer) if not name.endswith((".key", ".value"))]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in watched]
    for given, named, real in calls:
        masks.append(real)
        layer(*given, **named)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, (absolute, products, count) in sums.items():
        mean = products.float() / count
        found[name] = Moments((absolute / count).float(), mean, mean)
    for name in list(found):
        if name.endswith(".query"):
            for other in (".key", ".value"):
                found[name.removesuffix(".query") + other] = found[name]
    return found


def scale_layer(layer: Any, moments: dict[str, Moments], grid: Grid) -> dict[str, float]:
    """Fold factors into the weights of a layer, which keeps its function; `moments` become those of the new inputs.

    Returns α by the name of the first product that reads the input.
    """
    own, alphas = "attention.self.", {}
    value, products = layer.attention.self.value, [f"{own}query", f"{own}key", f"{own}value"]
    folds: list[tuple[Any, list[str]]] = [(value, ["attention.output.dense"])]
    if hasattr(layer.attention, "ln"):  # pre-LN: only these products read the norms
        folds = [(layer.attention.ln, products), *folds, (layer.ln, ["intermediate.dense"])]
    for maker, names in folds:
        part = moments[names[0]]
        weights = [layer.get_submodule(name).weight for name in names]
        found = best_factors(weights, part.means, part.products, grid)
        s = found.factors
        alphas[names[0]] = found.alpha
        for weight in weights:
            weight *= s
        maker.bias /= s
        if isinstance(maker, nn.Linear):
            maker.weight /= s[:, None]
        else:
            maker.weight /= s
        for name in names:
            moments[name] = Moments(part.means / s, part.products / s[:, None] / s, part.unscaled)
    return alphas
