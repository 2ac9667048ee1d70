"""What the model card of an export says about the run: its data, its recipe, its last validation loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pretrain.checkpoint.format import Checkpoint
from pretrain.run.folder import RunFolder

SOURCES_NAMED = 5


def sections(run: RunFolder, taken: list[Checkpoint], *, ema: bool = False) -> dict[str, str]:
    """The sections of the card, heading → Markdown. `taken` are the checkpoints of the export, newest first; `ema`:
    whether their moving averages were taken.
    """
    found = {"Data": _data(run, taken[0]), "Training": _training(run, taken, ema=ema)}
    scores = _scores(run, taken, ema=ema)
    return found | ({"Scores": scores} if scores else {})


def recipe_text(run: RunFolder) -> str:
    """The resolved config of a run in YAML; empty where the run has none."""
    return run.config.read_text(encoding="utf-8") if run.config.is_file() else ""


def _training(run: RunFolder, taken: list[Checkpoint], *, ema: bool) -> str:
    rows = taken[0].training["loader"]["rows_consumed"]
    text = f"Pretrained with masked language modelling for {taken[0].step:,} steps ({rows:,} rows)."
    if ema:
        text += f" The weights are the moving average over {taken[0].training['ema_steps']:,} steps (optimizer.ema)."
    if len(taken) > 1:
        steps = ", ".join(f"{checkpoint.step:,}" for checkpoint in reversed(taken))
        text += f" The weights are the mean of the checkpoints after steps {steps}."
    return f"{text} The recipe:\n\n```yaml\n{recipe_text(run).strip() or '(not recorded)'}\n```"


def _data(run: RunFolder, newest: Checkpoint) -> str:
    """The fingerprint of the data, and a table of those datasets that are still where the run read them."""
    text = f"Fingerprint of the data and its order: `{newest.training['loader']['fingerprint']}`."
    rows = [_table_row(path, manifest) for path, manifest in _manifests(run)]
    if rows:
        head = "| dataset | fingerprint | rows | tokens | documents | sources |\n|---|---|---|---|---|---|\n"
        text += f" Training split:\n\n{head}{''.join(rows)}"
    return text


def _manifests(run: RunFolder) -> list[tuple[Path, Mapping[str, Any]]]:
    try:
        given = OmegaConf.to_container(OmegaConf.create(recipe_text(run)))
        entries = given["data"]["dataset"]  # type: ignore[index, call-overload]
        paths = [Path(entry["path"] if isinstance(entry, dict) else entry) for entry in entries]
        return [(path, json.loads((path / "manifest.json").read_text(encoding="utf-8"))) for path in paths]
    except (OSError, ValueError, KeyError, TypeError):  # moved, remote, or no config: the card has no table
        return []


def _table_row(path: Path, manifest: Mapping[str, Any]) -> str:
    train = manifest["splits"]["train"]
    names = [Path(str(source.get("name", source))).name for source in manifest["sources"]]
    more = f", and {len(names) - SOURCES_NAMED:,} more" if len(names) > SOURCES_NAMED else ""
    cells = [path.name, f"`{str(manifest.get('fingerprint', ''))[:16]}…`"]
    cells += [f"{train[key]:,}" for key in ("rows", "tokens", "documents")]
    cells += [", ".join(names[:SOURCES_NAMED]) + more]
    return f"| {' | '.join(cells)} |\n"


def _scores(run: RunFolder, taken: list[Checkpoint], *, ema: bool) -> str:
    """The validation of the checkpoint: the last one up to its step that scored the weights, or with `ema` their
    average; empty where there is none."""
    last: dict[str, Any] = {}
    if run.log.is_file():
        for line in run.log.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a run that is still writing
                continue
            scored = "valid_loss" in entry and bool(entry.get("valid_of_average")) == ema
            if scored and entry["step"] <= taken[0].step:
                last = entry
    if not last:
        return ""
    of = " (of the newest of the checkpoints)" if len(taken) > 1 else ""
    return (
        f"Held-out rows, every chosen position masked, after step {last['step']:,}{of}: "
        f"loss {last['valid_loss']:.4f} nats, accuracy {last['valid_accuracy']:.4f}."
    )
