"""Muon for generated matrices: their gradients are made orthogonal before they reach the parameters.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, orthogonalises the momentum of each
matrix by a Newton-Schulz iteration. Here a layer's matrix is no parameter: it is generated from E and W_all. So each
matrix has a momentum of its own, the orthogonal result takes the norm of the gradient that it replaces, and the
backward pass carries it on to E and W_all, where AdamW uses it like any gradient.

A step needs the gradient of the whole global batch at once. The matrices' gradients of all micro-batches are summed
here, and those of all ranks in the backward pass of the last micro-batch. Cost: on each rank, gradient and momentum of
the generated matrices in fp32, 8 bytes for each of their 4H² + 2HI elements (268 MB at H 2048 and I 4096), and one
all-reduce of 4 bytes an element in each optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.distributed import World, share_of
from pretrain.engine.fragments import MOMENTUM, Fragment
from pretrain.engine.muon import MuonRecipe, orthogonalise

PREFIX = "generated."
"""Of the names of momenta in a checkpoint."""


class GeneratedMuon:
    """Replaces the gradients of the generated matrices, see `sharebert.sharing.OneGeneratedSet.change_gradients`."""

    def __init__(
        self, recipe: MuonRecipe, shapes: dict[str, tuple[int, int]], micro_batches: int, device: torch.device
    ) -> None:
        """`shapes`: of each matrix, by name, in the order of its gradients; `micro_batches`: of an optimizer step."""
        self._recipe, self._micro_batches, self._seen = recipe, micro_batches, 0
        sizes = [rows * columns for rows, columns in shapes.values()]
        self._sum = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        momentum = torch.zeros_like(self._sum)
        self._momentum = momentum
        views = zip(shapes, self._sum.split(sizes), momentum.split(sizes), strict=True)
        self._matrices = {name: (sums.view(shapes[name]), moment.view(shapes[name])) for name, sums, moment in views}

    def __call__(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients [in, out] to carry on for those of a micro-batch: none before the last one of a step.

        At the last one all ranks add up (a collective); they all carry on the same gradients, so that their mean, which
        DeepSpeed makes, is the same again. A sum that is not finite is carried on as it is: the engine skips the step.
        """
        self._seen += 1
        for (total, _), gradient in zip(self._matrices.values(), gradients, strict=True):
            if gradient is not None:
                total += gradient
        if self._seen < self._micro_batches:
            return [None] * len(gradients)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sum)
            self._sum /= dist.get_world_size()
        return [
            None if gradient is None else self._orthogonal(total, momentum).to(gradient.dtype)
            for gradient, (total, momentum) in zip(gradients, self._matrices.values(), strict=True)
        ]

    def _orthogonal(self, gradient: Tensor, momentum: Tensor) -> Tensor:
        """Nesterov's look ahead, made orthogonal, with `gain` times the norm of `gradient`."""
        decay = self._recipe.momentum
        ahead = gradient + decay * (decay * momentum + gradient)
        direction = orthogonalise(ahead, self._recipe.iterations)
        return direction * (self._recipe.gain * gradient.norm() / direction.norm().clamp(min=1e-30))

    def end_step(self, *, skipped: bool) -> None:
        """The optimizer step is over: its gradient becomes part of the momentum, unless it was skipped."""
        if not skipped:
            self._momentum.mul_(self._recipe.momentum).add_(self._sum)
        self._sum.zero_()
        self._seen = 0

    def owned(self, world: World) -> list[Fragment]:
        """This rank's share of the momenta, for a checkpoint. Live views."""
        found = []
        for whole in self.writable():
            part = share_of(whole.length, world.rank, world.world_size)
            if len(part):
                view = whole.tensors[MOMENTUM].narrow(0, part.start, len(part))
                found.append(Fragment(whole.name, part.start, len(part), {MOMENTUM: view}))
        return found

    def writable(self) -> list[Fragment]:
        """All momenta whole, as every rank holds them. Live views."""
        return [
            Fragment(PREFIX + name, 0, momentum.numel(), {MOMENTUM: momentum.view(-1)})
            for name, (_, momentum) in self._matrices.items()
        ]
