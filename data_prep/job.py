"""The plan of a recipe: inputs, parts, vocabulary, and the folder for the work in progress."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from data_prep.disk import save_array
from data_prep.filter.clean import Cleaner, normalise
from data_prep.filter.decontaminate import evaluation_ngrams
from data_prep.progress import say
from data_prep.read.documents import Batch, read_part
from data_prep.read.sources import Input, Part, check_unchanged, find_inputs, plan_parts
from data_prep.recipe import PrepRecipe
from data_prep.tokens.tokenizer import UNTRAINED, Vocabulary, load, train
from sharebert_common.errors import BadInput
from sharebert_common.files import write_atomically
from sharebert_common.recipe import plain

WORK = ".work"
"""Folder inside the output; it is deleted when the dataset is complete."""

EVALUATION = "evaluation.npy"
"""In the work folder: hashes of the n-grams of the evaluation sets."""

_SAMPLE_CHARS = 1 << 20


@dataclass(frozen=True)
class Job:
    """What every worker needs to know. It is pickled once a stage for each worker."""

    recipe: PrepRecipe
    work: Path
    inputs: list[Input]
    parts: list[Part]
    vocab: Vocabulary = UNTRAINED

    def documents(self, number: int, counts: Counter[str]) -> Iterator[Batch]:
        """The documents of a part, read and cleaned by the rules that look at one document at a time."""
        grams = np.load(self.work / EVALUATION, mmap_mode="r") if self.recipe.clean.evaluation.paths else None
        cleaner = Cleaner(self.recipe.clean, grams)
        for batch in self.normalised(number, counts):
            yield cleaner(batch, counts)

    def normalised(self, number: int, counts: Counter[str]) -> Iterator[Batch]:
        """All documents of a part, with their Unicode normalised, before any rule.

        Raises BadInput where an input was changed since the plan was made.
        """
        part = self.parts[number]
        try:
            for batch in read_part(part, self.inputs, self.recipe.source, counts):
                yield normalise(batch, self.recipe.clean)
        except BadInput:
            self._check_unchanged(part)  # it may be the cause
            raise
        self._check_unchanged(part)

    def _check_unchanged(self, part: Part) -> None:
        for number in sorted({piece.input for piece in part}):
            check_unchanged(self.inputs[number])


def plan(recipe: PrepRecipe) -> Job:
    """Find the inputs, divide them into parts, get the vocabulary. Raises BadInput."""
    inputs = find_inputs(recipe.source, recipe.output)
    parts = plan_parts(inputs, recipe.source)
    given = given_vocabulary(recipe)
    grams = evaluation_ngrams(recipe.clean.evaluation) if recipe.clean.evaluation.paths else np.zeros(0, np.uint64)
    identity = [content_config(recipe), [asdict(item) for item in inputs], given, version("sharebert")]
    identity.append(hashlib.sha256(grams.tobytes()).hexdigest())
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    work = Path(recipe.output) / WORK / name
    work.mkdir(parents=True, exist_ok=True)
    # Machines that begin at the same time all do this and get the same result, so it does not matter which is last.
    if len(grams):
        temporary = work / f".{EVALUATION}.{uuid4().hex}"
        save_array(temporary, grams)
        temporary.replace(work / EVALUATION)
    file = work / "tokenizer.json"
    if not file.exists():
        if given is None:
            say(f"learning a vocabulary of {recipe.tokenizer.train.vocab_size} words")
        text = given or train(lambda: _sample(Job(recipe, work, inputs, parts)), recipe.tokenizer)
        write_atomically(file, text)
    return Job(recipe, work, inputs, parts, Vocabulary.parse(file.read_bytes().decode()))


def given_vocabulary(recipe: PrepRecipe) -> str | None:
    """The text of the tokenizer that the recipe names, or None. Raises BadInput."""
    path = recipe.tokenizer.path
    return load(path, recipe.tokenizer.lowercase) if path else None


def content_config(recipe: PrepRecipe) -> dict[str, Any]:
    """The recipe without paths of this machine and the number of workers, which do not change the dataset."""
    config = plain(recipe)
    for key in ("output", "workers"):
        del config[key]
    for key in ("paths", "hub"):
        del config["source"][key]
    del config["tokenizer"]["path"]
    config["clean"]["evaluation"]["paths"] = [Path(path).name for path in recipe.clean.evaluation.paths]
    return config


def _sample(job: Job) -> Iterator[str]:
    """Text to train a vocabulary on, evenly from all parts."""
    share = job.recipe.tokenizer.train.sample_bytes // len(job.parts)
    for number in range(len(job.parts)):
        counts: Counter[str] = Counter()
        for batch in job.documents(number, counts):
            for text in batch.texts:
                # The trainer needs many times the memory of its input: 5 GB for a document of 64 MB.
                yield from (text[i : i + _SAMPLE_CHARS] for i in range(0, len(text), _SAMPLE_CHARS))
            if counts["bytes_in"] >= share:
                break
