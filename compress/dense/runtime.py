"""Runs a folder in the ONNX form with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exports.onnx import FILE
from sharebert_common.errors import BadInput


class OnnxModel:
    """The model of an ONNX folder, or of an ONNX file."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Raises BadInput: onnxruntime is missing, or the file is missing or not readable."""
        try:
            import onnxruntime
        except ImportError as error:
            raise BadInput("ONNX models need one more package: pip install onnxruntime") from error
        file = path / FILE if path.is_dir() else path
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone: token_type_ids is an input with a default on purpose
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # each kind of damage has a class of its own
            raise BadInput(f"{file}: ONNX Runtime cannot read it ({str(error).splitlines()[0]})") from error
        self.outputs = [output.name for output in self.session.get_outputs()]

    def __call__(
        self,
        tokens: Tensor,
        attention_mask: Tensor,
        names: list[str] | None = None,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The outputs by name (all of them, or `names`) for ids, mask and types, int64 [B, T]; no types are all 0."""
        wanted = names or self.outputs
        given = {"input_ids": tokens.numpy(), "attention_mask": attention_mask.numpy()}
        if token_type_ids is not None:
            given["token_type_ids"] = token_type_ids.numpy()
        return dict(zip(wanted, map(torch.from_numpy, self.session.run(wanted, given)), strict=True))

    def logits(self, tokens: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Scores of all words [B, T, V], or of a classifier's labels [B, labels].

        Raises BadInput: the model has neither.
        """
        if "logits" not in self.outputs:
            raise BadInput("the ONNX model has no masked-language-model head and no classifier, so it has no logits")
        return self(tokens, attention_mask, ["logits"], token_type_ids)["logits"]


def batches(rows: Tensor, pad: int, size: int = 8) -> Iterator[dict[str, Any]]:
    """The inputs of a session for rows [N, T] that end in the id `pad`, `size` rows of one length at a time, so that
    there is no padding: whoever looks at activations inside the model would count those of it."""
    lengths = ((rows != pad) * torch.arange(1, rows.shape[1] + 1)).amax(1)
    for length in lengths.unique().tolist():
        for part in rows[lengths == length, :length].split(size) if length else ():
            yield {"input_ids": part.numpy(), "attention_mask": (part != pad).numpy().astype(np.int64)}
