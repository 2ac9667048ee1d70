"""The nine tasks of GLUE (Wang et al., ICLR 2019): columns, labels in the hub's order, metrics."""

from __future__ import annotations

from dataclasses import dataclass

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """What a task asks."""

    name: str
    text: tuple[tuple[str, ...], ...]
    """For one text, or each of a pair: the names that its column may have."""
    label: tuple[str, ...] = ("label",)
    """The names that the label's column may have."""
    labels: tuple[str, ...] = ()
    """Their words; in files they may also be numbers from 0. Empty for regression, or until train is read."""
    metrics: tuple[str, ...] = ("accuracy",)
    """Names of functions in `scoring.metrics`; their mean is what a sweep goes by."""
    regression: bool = False
    header: tuple[str, ...] = ()
    """The columns of its files where they have no header."""
    dev: tuple[str, ...] = ("dev",)
    """Its dev splits, as files are named; on the hub, `validation` stands for `dev`."""


_ENTAILMENT = ("entailment", "not_entailment")
_PAIR = (("sentence1",), ("sentence2",))

TASKS = {
    task.name: task
    for task in (
        Task(
            "cola",
            text=(("sentence",),),
            labels=("unacceptable", "acceptable"),
            metrics=("matthews",),
            header=("source", "label", "mark", "sentence"),
        ),
        Task("sst2", text=(("sentence",),), labels=("negative", "positive")),
        Task(
            "mrpc",
            text=(("sentence1", "#1 String"), ("sentence2", "#2 String")),
            label=("label", "Quality"),
            labels=("not_equivalent", "equivalent"),
            metrics=("f1", "accuracy"),
        ),
        Task("stsb", text=_PAIR, label=("label", "score"), metrics=("pearson", "spearman"), regression=True),
        Task(
            "qqp",
            text=(("question1",), ("question2",)),
            label=("label", "is_duplicate"),
            labels=("not_duplicate", "duplicate"),
            metrics=("f1", "accuracy"),
        ),
        Task(
            "mnli",
            text=(("premise", "sentence1"), ("hypothesis", "sentence2")),
            label=("label", "gold_label"),
            labels=("entailment", "neutral", "contradiction"),
            dev=("dev_matched", "dev_mismatched"),
        ),
        Task("qnli", text=(("question",), ("sentence",)), labels=_ENTAILMENT),
        Task("rte", text=_PAIR, labels=_ENTAILMENT),
        Task("wnli", text=_PAIR, labels=("not_entailment", "entailment")),
    )
}
