"""AdamW whose groups may clip their gradient, and one of which may be stepped by Muon.

Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) needs whole matrices, and under
ZeRO 1 and 2 a rank holds a part of a flattened group. The momentum is made element by element, so each rank has that
of its part. Then the ranks gather the sums of gradient and momentum, and each makes those matrices orthogonal of which
it owns elements. So the step is that of one rank alone, on any number of ranks.

Cost, for the matrices' n elements on R ranks: momentum of 4n/R bytes a rank (4n at stage 0), where AdamW has 8n/R; one
all-gather of 4n bytes in each step, and as much memory while it lasts. DeepSpeed 0.19.8 has a Muon of its own. It clips
after it made the gradient orthogonal, so that the step's size depends on the clip, and is left out for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.engine.fragments import MOMENTUM
from pretrain.engine.muon import MuonRecipe, orthogonalise


class GroupedAdamW(torch.optim.AdamW):
    """See above. Groups are those of `parameter_groups.split_groups`."""

    def __init__(self, groups: list[dict[str, Any]], muon: MuonRecipe, **settings: Any) -> None:
        """`settings`: of AdamW."""
        super().__init__(groups, **settings)
        self._muon = muon
        self._starts: list[Sequence[int]] | None = None

    def divide(self, starts: list[Sequence[int]]) -> None:
        """From now on each group holds this rank's part of its parameters, flattened and cut into equal parts.

        `starts`: for each group, where each of its parameters begins in the whole flattened group, in elements.
        """
        self._starts = starts
        for group, own in zip(self.param_groups, starts, strict=True):
            group["starts"] = own

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of each group in `param_groups`: ZeRO puts one after another there. Of all ranks together."""
        groups = self.param_groups
        for group in groups:
            if group["clip"]:
                self._clip(group)
        try:
            self.param_groups = [group for group in groups if group["matrices"] is None]
            if self.param_groups:
                super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["matrices"] is not None:
                self._step_part(group) if self._starts is not None else self._step_whole(group)

    def _clip(self, group: dict[str, Any]) -> None:
        """Shorten the gradient of a group to its clip, as `torch.nn.utils.clip_grad_norm_` does."""
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        squares = torch.stack([gradient.norm() for gradient in gradients]).double().square().sum()
        if self._starts is not None and dist.get_world_size() > 1:
            dist.all_reduce(squares)
        factor = (group["clip"] / (squares.sqrt() + 1e-6)).clamp(max=1.0).float()
        for gradient in gradients:
            gradient.mul_(factor)

    def _step_whole(self, group: dict[str, Any]) -> None:
        for p, (_, _, size) in zip(group["params"], group["matrices"], strict=True):
            if p.grad is not None:  # else the step is skipped
                ahead = self._look_ahead(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonalise(ahead, self._muon.iterations), alpha=-group["lr"] * size)

    def _step_part(self, group: dict[str, Any]) -> None:
        (part,) = group["params"]
        if part.grad is None:
            return
        ahead, ranks = self._look_ahead(part), dist.get_world_size()
        whole = ahead
        if ranks > 1:
            whole = ahead.new_empty(ranks * ahead.numel())
            dist.all_gather_into_tensor(whole, ahead)
        part.mul_(1 - group["lr"] * group["weight_decay"])
        first = dist.get_rank() * part.numel()
        for start, (rows, columns, size) in zip(group["starts"], group["matrices"], strict=True):
            begin, end = max(first, start), min(first + part.numel(), start + rows * columns)
            if begin < end:
                matrix = whole[start : start + rows * columns].view(rows, columns)
                direction = orthogonalise(matrix, self._muon.iterations).reshape(-1)
                part[begin - first : end - first].add_(
                    direction[begin - start : end - start], alpha=-group["lr"] * size
                )

    def _look_ahead(self, p: Tensor) -> Tensor:
        """The gradient becomes part of the momentum; Nesterov's sum of both."""
        state, decay = self.state[p], self._muon.momentum
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(p)
        assert p.grad is not None
        state[MOMENTUM].mul_(decay).add_(p.grad)
        return p.grad + decay * state[MOMENTUM]
