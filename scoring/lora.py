"""Fine-tuning by updates of a low rank: matrices are fixed, and what is added to each has few numbers.

LoRA (Hu et al., ICLR 2022): W + (alpha / rank)·A·B. DoRA (Liu et al., ICML 2024): m·V / ‖V‖ with V = W + (alpha /
rank)·A·B, a learned length m for each output, and ‖V‖ without a gradient. `peft` does both for modules; the matrices
that a ShareBERT generates are no modules, so their updates are here.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoring.encoders import Encoder, HuggingFaceEncoder
from scoring.recipe import FACTORS, GENERATED, FineTuneRecipe, LoraRecipe
from sharebert.sharing import SameForAll, Weights
from sharebert_common.errors import BadInput, nearest

KEY = "finetune.lora"


class Adapted(ABC):
    """A classifier whose updates and head alone are trained.

    Args:
        model: the classifier.
        head: the names of the parameters that are trained as they are.
    """

    def __init__(self, model: nn.Module, head: Sequence[str]) -> None:
        parameters = dict(model.named_parameters())
        self._head = [parameters[name] for name in head]
        self.model = model
        """The classifier with its updates: the same object, changed in place."""
        self.add_updates()
        for parameter in self._head:
            parameter.requires_grad_(True)

    @property
    def trained(self) -> int:
        """The number of trained parameters, with those of the head."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @abstractmethod
    def add_updates(self) -> None:
        """Add updates that change nothing yet, and train nothing else."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """The classifier without updates, whose matrices hold them."""


def adapt(encoder: Encoder, model: nn.Module, settings: FineTuneRecipe) -> Adapted:
    """Give a classifier that `encoder` built the updates of `settings.lora`; their start depends on torch's seed.

    Raises BadInput: targets that the model does not have, a rank above the smaller side of a target, or a setting that
    updates cannot follow.
    """
    recipe, kind = settings.lora, encoder.sharing
    if settings.quantise.bits is not None:
        raise BadInput(f"{KEY}: goes without finetune.quantise, which rounds the matrices that updates leave fixed")
    head = encoder.new_parameters(model)
    if isinstance(encoder, HuggingFaceEncoder):
        return ModuleUpdates(model, head, recipe, module_targets(model, recipe))
    targets = recipe.targets or [FACTORS]
    if targets not in ([FACTORS], [GENERATED]):
        raise BadInput(f"{KEY}.targets: {_listed(targets)}: for a ShareBERT give {FACTORS} or {GENERATED}")
    if recipe.dropout:
        raise BadInput(
            f"{KEY}.dropout: is for Hugging Face encoders; the updates of a ShareBERT are made without an input "
            "to drop from"
        )
    if kind not in ("veps", "eps"):
        raise BadInput(
            f"{KEY}.targets: {targets[0]}: {encoder.folder} has sharing: {kind}, which generates no matrices"
        )
    if targets == [GENERATED]:
        return MatrixUpdates(model, head, recipe)
    names = ["sharebert.word_embeddings"] + (["sharebert.factor_linear_all"] if kind == "veps" else [])
    return ModuleUpdates(model, head, recipe, names)


def module_targets(model: Any, recipe: LoraRecipe) -> list[str]:
    """The modules of a Hugging Face classifier that get updates, by their full names.

    Raises BadInput: a name that no module has, or a module that shares its weight with another one. (Merged, its
    update would change the other module too: huggingface/peft#2018.)
    """
    prefix = f"{model.base_model_prefix}."
    possible = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(prefix) and isinstance(module, (nn.Linear, nn.Embedding))
    }
    parts = sorted({name.rpartition(".")[2] for name in possible})
    chosen = [name for name, module in possible.items() if isinstance(module, nn.Linear) and not recipe.targets]
    for target in recipe.targets:
        found = [name for name in possible if name == target or name.endswith(f".{target}")]
        if not found:
            for_us = f": {target} is for ShareBERT exports" if target in (FACTORS, GENERATED) else ""
            raise BadInput(
                f"{KEY}.targets: no linear layer or embedding is named {target}{for_us or nearest(target, parts)} "
                f"(there are {', '.join(parts)})"
            )
        chosen += [name for name in found if name not in chosen]
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            users.setdefault(module.weight.data_ptr(), []).append(name)
    for name in chosen:
        others = [other for other in users[possible[name].weight.data_ptr()] if other != name]
        if others:
            raise BadInput(
                f"{KEY}.targets: {name} shares its weight with {others[0]}, which its update would change too; "
                "leave it out"
            )
    return chosen


class ModuleUpdates(Adapted):
    """Updates of linear layers and embeddings, through `peft`."""

    def __init__(self, model: nn.Module, head: Sequence[str], recipe: LoraRecipe, targets: Sequence[str]) -> None:
        for name in targets:
            _check_rank(recipe, name, model.get_submodule(name).weight)  # type: ignore[arg-type]
        self._recipe, self._targets = recipe, list(targets)
        super().__init__(model, head)

    def add_updates(self) -> None:
        """See `Adapted.add_updates`."""
        try:
            import peft
        except ImportError as error:
            raise BadInput(f"{KEY} needs peft: pip install 'sharebert[lora]'") from error
        assert self._recipe.rank is not None
        config = peft.LoraConfig(
            r=self._recipe.rank,
            lora_alpha=self._recipe.scale * self._recipe.rank,  # type: ignore[arg-type]
            lora_dropout=self._recipe.dropout,
            use_dora=self._recipe.kind == "dora",
            target_modules=self._targets,
        )
        with warnings.catch_warnings():  # peft warns of tied embeddings, which `module_targets` has ruled out
            warnings.simplefilter("ignore")
            self._peft: Any = peft.get_peft_model(self.model, config)  # type: ignore[arg-type]

    def merged(self) -> nn.Module:
        """See `Adapted.merged`."""
        return self._peft.merge_and_unload()  # type: ignore[no-any-return]


class MatrixUpdates(Adapted):
    """Updates of the matrices that a ShareBERT generates. No factors make the sums, so they are stored as they are."""

    def __init__(self, model: Any, head: Sequence[str], recipe: LoraRecipe) -> None:
        config = model.config.plain()
        if config.sharing == "eps" or config.altered:
            raise BadInput(
                f"{KEY}.targets: {GENERATED} takes a ShareBERT with sharing: veps that is not pruned and has one "
                f"feed-forward pair; take {FACTORS}"
            )
        self._recipe = recipe
        super().__init__(model, head)

    def add_updates(self) -> None:
        """See `Adapted.add_updates`."""
        model: Any = self.model.requires_grad_(False)
        with torch.no_grad():
            made = model.sharebert.layer_weights()
        pools = model.config.classifier_pooling == "pooler"
        matrices = {**made.of_layer(0)._asdict(), "pooler": made.pooler}
        self._sums = UpdatedMatrices(matrices, self._recipe, fixed=() if pools else ("pooler",))
        model.sharebert.sharing = self._sums

    def merged(self) -> nn.Module:
        """As `Adapted.merged`: a classifier with `sharing: layers`, which stores one set of matrices."""
        model: Any = self.model
        config = copy.deepcopy(model.config)
        config.sharing = "layers"
        found: nn.Module = type(model)(config)
        dropped = ("sharebert.sharing.", "sharebert.factor_linear_all.")
        tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(dropped)}
        with torch.no_grad():
            for name in self._sums.names:
                place = "sharebert.sharing." + (name if name == "pooler" else f"layers.0.{name}")
                tensors[place] = self._sums.matrix(name)
        found.load_state_dict(tensors)
        return found.to(next(model.parameters()).device)


class UpdatedMatrices(nn.Module):
    """A `Sharing` whose matrices are fixed ones with an update each, the same for all layers."""

    def __init__(self, matrices: dict[str, Tensor], recipe: LoraRecipe, fixed: Sequence[str]) -> None:
        """Matrices [in, out] by the names of `Weights` and `pooler`; those of `fixed` get no update."""
        super().__init__()
        assert recipe.rank is not None
        self.names, self._scale, self._dora = list(matrices), recipe.scale, recipe.kind == "dora"
        self._updated = [name for name in matrices if name not in fixed]
        for name, matrix in matrices.items():
            self.register_buffer(f"{name}_base", matrix.clone())
            if name in fixed:
                continue
            _check_rank(recipe, name, matrix)
            rows, columns = matrix.shape
            a = torch.empty(rows, recipe.rank).uniform_(-(rows**-0.5), rows**-0.5)  # as peft starts it
            self.register_parameter(f"{name}_a", nn.Parameter(a))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.zeros(recipe.rank, columns)))
            if self._dora:
                self.register_parameter(f"{name}_length", nn.Parameter(matrix.norm(dim=0)))

    def forward(self, encoder: Any, pooler: bool) -> SameForAll:
        """The sums of one forward pass."""
        made = Weights(*map(self.matrix, Weights._fields))
        return SameForAll(made, self.matrix("pooler") if pooler else None)

    def matrix(self, name: str) -> Tensor:
        """The matrix [in, out] with its update."""
        base: Tensor = getattr(self, f"{name}_base")
        if name not in self._updated:
            return base
        total = base + self._scale * (getattr(self, f"{name}_a") @ getattr(self, f"{name}_b"))
        return total * (getattr(self, f"{name}_length") / total.norm(dim=0).detach()) if self._dora else total


def _check_rank(recipe: LoraRecipe, name: str, matrix: Tensor) -> None:
    assert recipe.rank is not None
    if recipe.rank > min(matrix.shape):
        raise BadInput(f"{KEY}.rank: {recipe.rank} is above {min(matrix.shape)}, the smaller side of {name}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
