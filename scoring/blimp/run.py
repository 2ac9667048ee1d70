"""`sharebert evaluate --task blimp`: models one after the other, paradigm by paradigm, resumable."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch

from scoring.blimp.likelihood import find_problems, pseudo_log_likelihoods
from scoring.blimp.masked_lm import MaskedLM, open_masked_lm
from scoring.blimp.pairs import FIELD, TERM, Paradigm, accuracy, by_kind, read_paradigms
from scoring.finetune import latency_ms
from scoring.recipe import BLIMP, EvaluateRecipe, TaskDataRecipe
from scoring.report import Result, details_table, file_name, read_results, result_file, table, versions, write_result
from scoring.tables import BadRows
from sharebert_common.errors import BadInput
from sharebert_common.files import make_folders

PAIRS = "pairs"
"""The folder for the scores of all pairs, beside the results."""

Scores = list[tuple[float, float]]
"""The scores of the acceptable and the unacceptable sentence of each pair."""


def evaluate_blimp(recipe: EvaluateRecipe, models: Sequence[str], device: torch.device) -> str:
    """Score each of `models`, and write the results into a folder of the task in `recipe.output`.

    Returns: the table of all results, and the accuracies by field and linguistics term.

    Raises BadInput or ShareBertError before the first paradigm, if something that was given is wrong.
    """
    if recipe.data != TaskDataRecipe(path=recipe.data.path, bad_rows=recipe.data.bad_rows):
        raise BadInput("data: blimp takes data.path and data.bad_rows alone; for a subset: blimp.pairs=…")
    paradigms = read_paradigms(recipe.data.path, recipe.blimp.pairs)
    usable = {}
    for spec in models:  # what is wrong is found before an hour is spent on another model
        usable[spec] = _usable(open_masked_lm(spec, torch.device("cpu")), paradigms, recipe.data.bad_rows == "skip")
    folder = Path(recipe.output) / file_name(BLIMP)
    make_folders(folder / PAIRS)
    read_results(folder)
    for spec in models:
        kept, bad = usable[spec]
        if bad.places:
            print(bad.note(), file=sys.stderr)
        write_result(folder, _score(spec, open_masked_lm(spec, device), kept, bad, folder))
    results = read_results(folder)
    return f"{table(results)}\n\n{details_table(results, (FIELD, TERM))}"


def _usable(lm: MaskedLM, paradigms: Sequence[Paradigm], skip: bool) -> tuple[list[Paradigm], BadRows]:
    """The paradigms with the pairs that the model can take, and the other pairs.

    Raises BadInput: a pair that it cannot take, if such pairs are not skipped, or a paradigm with none that it can.
    """
    bad = BadRows(str(lm.folder), skip, "pairs")
    kept = []
    for paradigm in paradigms:
        problems = find_problems(lm, [sentence for pair in paradigm.pairs for sentence in pair])
        good = []
        for pair, found in zip(paradigm.pairs, zip(problems[::2], problems[1::2], strict=True), strict=True):
            if problem := found[0] or found[1]:
                bad.found(paradigm.uid, problem)
            else:
                good.append(pair)
        if not good:
            raise BadInput(f"{lm.folder}: can take no pair of {paradigm.uid}: {bad.first}")
        kept.append(Paradigm(paradigm.uid, paradigm.field, paradigm.term, good))
    return kept, bad


def _score(spec: str, lm: MaskedLM, paradigms: Sequence[Paradigm], bad: BadRows, folder: Path) -> Result:
    file = folder / PAIRS / f"{result_file(folder, spec).stem}.jsonl"
    started = time.perf_counter()
    accuracies = {}
    for number, (paradigm, scores) in enumerate(_scores(lm, paradigms, file), 1):
        accuracies[paradigm.uid] = accuracy(scores)
        print(
            f"blimp  {spec}  {number}/{len(paradigms)}  {paradigm.uid}  {100 * accuracies[paradigm.uid]:.1f}"
            f"  {time.perf_counter() - started:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    parameters = list(lm.model.parameters())
    device = parameters[0].device
    return Result(
        task=BLIMP,
        model=spec,
        scores={BLIMP: {"accuracy": [mean(accuracies.values())]}},
        details=by_kind(paradigms, accuracies),
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.nbytes for parameter in parameters),
        latency_ms=latency_ms(
            lambda texts: pseudo_log_likelihoods(lm, [text for (text,) in texts]),
            [(good,) for good, _ in paradigms[0].pairs],
        ),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        train_rows=0,
        fit_s=[],
        settings={"pairs": sum(len(paradigm.pairs) for paradigm in paradigms)},
        versions=versions(),
        skipped_rows={bad.where: len(bad.places)} if bad.places else {},
    )


def _scores(lm: MaskedLM, paradigms: Sequence[Paradigm], file: Path) -> Iterator[tuple[Paradigm, Scores]]:
    """The scores of each paradigm, from `file` if they are in it: a call that was stopped resumes there.

    A line of the file counts only for the same model files and the same pairs.
    """
    model = lm.fingerprint()
    known = _read_known(file)
    with file.open("a", encoding="utf-8") as out:
        for paradigm in paradigms:
            key = hashlib.sha256(json.dumps([model, asdict(paradigm)]).encode()).hexdigest()
            if key not in known:
                texts = [sentence for pair in paradigm.pairs for sentence in pair]
                values = pseudo_log_likelihoods(lm, texts)
                known[key] = list(zip(values[::2], values[1::2], strict=True))
                out.write(json.dumps({"key": key, "uid": paradigm.uid, "scores": known[key]}) + "\n")
                out.flush()
                os.fsync(out.fileno())
            yield paradigm, known[key]


def _read_known(file: Path) -> dict[str, Scores]:
    """Key → scores, from the whole lines of a file. A call that was killed may leave a part of a line at the end."""
    if not file.exists():
        return {}
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(file, len(whole))
    found = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            found[str(entry["key"])] = [(float(good), float(bad)) for good, bad in entry["scores"]]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{file}, line {number}: not a line that evaluate wrote; remove the file") from error
    return found
