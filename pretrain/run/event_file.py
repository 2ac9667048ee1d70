"""TensorBoard's event files of a run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TAGS = {
    "loss": "train/loss",
    "accuracy": "train/accuracy",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "data_wait_s": "speed/data_wait",
    "step_s": "speed/step_s",
    "skipped": "health/skipped",
    "loss_deviations": "health/loss_deviations",
    "slowest_rank_factor": "health/slowest_rank_factor",
    "memory_bytes": "health/memory_bytes",
    "valid_loss": "valid/loss",
    "valid_accuracy": "valid/accuracy",
}
"""TensorBoard's tag for each key of a line of `log.jsonl`."""


class EventFile:
    """Writes points. After a failed write a new file continues from the same step, and the failed one is left."""

    def __init__(self, path: Path, resumed_from: int, config_yaml: str) -> None:
        self.path = path
        self.waiting: list[dict[str, Any]] = []
        self._writer: SummaryWriter | None = None
        self._config_yaml = "" if resumed_from else config_yaml
        self._purge_step = resumed_from + 1 if resumed_from else 0  # an earlier attempt may have died at once

    def write(self) -> None:
        """Write the points of the lines that wait. Raises OSError where the disk does not take them."""
        from torch.utils.tensorboard import SummaryWriter

        try:
            if self._writer is None:
                self._writer = SummaryWriter(str(self.path), purge_step=self._purge_step)
                if self._config_yaml:
                    self._writer.add_text("config", f"```yaml\n{self._config_yaml}\n```", 0)
            for values in self.waiting:
                for key, tag in TAGS.items():
                    if key in values:
                        self._writer.add_scalar(tag, values[key], values["step"])
            self._writer.flush()
        except OSError:
            self._purge_step = self.waiting[0]["step"]
            self.close()
            self._writer = None
            raise
        self._config_yaml = ""
        self.waiting.clear()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
