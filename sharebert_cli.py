"""The `sharebert` command: one verb a stage, nothing else.

A verb imports its stage when it is called, so that `sharebert --help` costs no torch. What was given
wrongly is one line and exit code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sharebert_common.errors import BadInput
from sharebert_common.recipe import describe, load

FINISHED, FAILED, BAD_INPUT = 0, 1, 2


def prep(given: argparse.Namespace) -> int:
    from data_prep.pipeline import PrepRecipe, prepare

    print(prepare(load(PrepRecipe, given.config, given.overrides), task=given.task))
    return FINISHED


def train(given: argparse.Namespace) -> int:
    from pretrain.__main__ import launch

    return launch(given.config, given.overrides, debug=given.debug)


def plan(given: argparse.Namespace) -> int:
    from pretrain.plan import report
    from pretrain.recipe import TrainRecipe

    print(report(load(TrainRecipe, given.config, given.overrides), gpus=given.gpus, gpu=given.gpu))
    return FINISHED


def consolidate(given: argparse.Namespace) -> int:
    from pretrain.export.consolidate import consolidate

    done = consolidate(
        given.source,
        given.out,
        form=given.form,
        head=not given.no_head,
        dtype=given.dtype,
        average=given.average,
        config=given.config,
        opset=given.opset,
    )
    print(done)
    return FINISHED


def import_authors(given: argparse.Namespace) -> int:
    from exports.authors import import_authors

    import_authors(given.folder, given.out)
    print(given.out)
    return FINISHED


def evaluate(given: argparse.Namespace) -> int:
    from scoring.recipe import EvaluateRecipe
    from scoring.score import evaluate

    overrides = [item for item in given.models if "=" in item]
    for key, value in (("task", given.task), ("data.path", given.data)):
        overrides += [] if value is None else [f"{key}={json.dumps(value)}"]
    models = [item for item in given.models if "=" not in item]
    print(evaluate(load(EvaluateRecipe, given.recipe, overrides), models, save=given.save))
    return FINISHED


def fill(given: argparse.Namespace) -> int:
    from exports.fill import fill

    for number, words in enumerate(fill(given.export, given.text, top=given.top), 1):
        print(f"mask {number}: " + "  ".join(f"{word} {probability:.3f}" for word, probability in words))
    return FINISHED


CLUSTER_FLAGS = {
    "nodes": "nodes; with --stage prep, tasks of the array",
    "gpus-per-node": "GPUs of each node",
    "procs-per-node": "processes of each node, where they are not one a GPU",
    "cpus-per-process": "CPU cores of each process",
    "time": "time limit, as 24:00:00; a run that needs longer requeues itself",
    "partition": "SLURM's partition",
    "account": "SLURM's account",
    "qos": "SLURM's quality of service",
    "memory": "memory of each node, as 64G",
    "constraint": "features that nodes must have",
    "exclude": "nodes to leave out",
    "container": "image to run in",
}
"""The keys of a cluster recipe that have a flag of their own."""


def submit(given: argparse.Namespace) -> int:
    from cluster.recipe import load_cluster
    from cluster.submit import dry_run
    from cluster.submit import submit as submit_trainings

    overrides = [word for word in given.words if "=" in word]
    configs = [word for word in given.words if "=" not in word]
    if not configs:
        raise BadInput("CONFIG: a recipe is needed; key=value alone names none")
    flags = {name.replace("-", "_"): getattr(given, name.replace("-", "_")) for name in CLUSTER_FLAGS}
    from_flags = [f"{name}={_quoted(value)}" for name, value in flags.items() if value is not None]
    on = load_cluster(given.cluster, from_flags + given.set)
    if given.stage == "prep":
        return _submit_prep(configs, overrides, on, show=given.dry_run)
    trainings, recipes = _trainings(configs, overrides, on)
    if given.dry_run:
        print("\n\n".join(dry_run(training) for training in trainings))
        return FINISHED
    for training, job in zip(trainings, submit_trainings(trainings, recipes), strict=True):
        print(f"{training.run}: job {job}")
    return FINISHED


def _trainings(configs: list[str], overrides: list[str], on: Any) -> tuple[list[Any], list[str]]:
    """Trainings to submit, and their resolved recipes as YAML; paths absolute, as a job may start elsewhere."""
    from cluster.folder import ClusterFolder
    from cluster.launch import Training
    from pretrain.recipe import TrainRecipe
    from sharebert_common.recipe import to_yaml

    trainings, recipes = [], []
    for config in configs:
        recipe = load(TrainRecipe, config, overrides)
        recipe.run = str(Path(recipe.run).absolute())
        on_disk = [entry for entry in recipe.data.dataset if "://" not in entry.path]
        for entry in on_disk:
            entry.path = str(Path(entry.path).absolute())
        module = ("pretrain", str(ClusterFolder(recipe.run).recipe))
        datasets = tuple(Path(entry.path) for entry in on_disk)
        trainings.append(Training(run=Path(recipe.run), module=module, datasets=datasets, recipe=on))
        recipes.append(to_yaml(recipe))
    return trainings, recipes


def _submit_prep(configs: list[str], overrides: list[str], on: Any, *, show: bool) -> int:
    from cluster.submit import submit_prep
    from data_prep.filter.dedup import rules
    from data_prep.pipeline import PrepRecipe

    if len(configs) > 1 or show:
        raise BadInput("--stage prep: takes one recipe, and has no --dry-run")
    recipe = load(PrepRecipe, configs[0], overrides)
    rounds = 4 if rules(recipe.clean) else 2  # stages that need all of the one before
    command = [sys.executable, "-m", "sharebert_cli", "prep", configs[0], *overrides]
    for job in submit_prep(command, Path(recipe.output), rounds, on):
        print(f"{recipe.output}: job {job}")
    return FINISHED


def status(given: argparse.Namespace) -> int:
    from cluster.status import all_runs
    from cluster.status import status as status_of

    print(status_of(given.run).text() if given.run else all_runs())
    return FINISHED


def logs(given: argparse.Namespace) -> int:
    from cluster.logs import newest_failure, rank_0

    if given.failed:
        print(newest_failure(given.run))
        return FINISHED
    with suppress(KeyboardInterrupt):
        for line in rank_0(given.run, follow=given.follow):
            print(line, flush=True)
    return FINISHED


def stop(given: argparse.Namespace) -> int:
    from cluster.status import stop as ask

    print(ask(given.run))
    return FINISHED


def _quoted(value: str) -> str:
    """A flag's value as YAML that does not turn 24:00:00 into a number."""
    return f'"{value}"'


def _task(text: str) -> tuple[int, int]:
    """`I/N` as numbers."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"'{text}': written I/N, with I from 0 to N-1")
    return int(number), int(count)


def _with_config(parser: argparse.ArgumentParser, schema: str) -> None:
    """Let a verb take `CONFIG [key=value ...]`; its `--help` ends with the keys of `schema`, "module:class"."""
    parser.add_argument("config", help="path of a recipe, or the name of one that ships with the project")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="wins over the recipe")
    parser.set_defaults(schema=schema, words_are="overrides")


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their arguments."""
    parser = argparse.ArgumentParser(prog="sharebert", description="Pretrain compact ShareBERT encoders.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of bad input")
        sub.set_defaults(verb=run)
        return sub

    sub = verb("prep", prep, "Make a dataset from text.")
    _with_config(sub, "data_prep.recipe:PrepRecipe")
    sub.add_argument(
        "--task",
        type=_task,
        metavar="I/N",
        help="do the I-th of N shares of the work (I from 0); a last run without --task finishes the dataset",
    )
    _with_config(verb("train", train, "Train, or go on, on one process."), "pretrain.recipe:TrainRecipe")
    sub = verb("plan", plan, "What a training will cost: parameters, memory, FLOPs, hours.")
    _with_config(sub, "pretrain.recipe:TrainRecipe")
    sub.add_argument("--gpus", type=int, default=8, help="number of GPUs (default 8)")
    sub.add_argument("--gpu", default="h100", help="kind of GPU (default h100)")
    sub = verb("submit", submit, "Submit trainings, or prep, to SLURM, and keep them alive; or run them here.")
    sub.add_argument(
        "words", nargs="+", metavar="CONFIG [CONFIG ...] [key=value ...]", help="recipes; several: an array"
    )
    sub.add_argument("--cluster", default="slurm", help="a cluster recipe: slurm, local, or a path (default slurm)")
    sub.add_argument("--stage", choices=("train", "prep"), default="train", help="what the recipe is of")
    for flag, summary in CLUSTER_FLAGS.items():
        sub.add_argument(f"--{flag}", help=summary)
    sub.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="any key of the cluster recipe, as env.X=1"
    )
    sub.add_argument("--dry-run", action="store_true", help="print the batch script and the torchrun line")
    sub.set_defaults(schema="cluster.recipe:ClusterRecipe", words_are="words")
    sub = verb("status", status, "How a run stands; without RUN, a line for each that was submitted.")
    sub.add_argument("run", type=Path, nargs="?", help="directory of the run")
    sub = verb("logs", logs, "Follow rank 0 of a run, or show the rank that failed first.")
    sub.add_argument("run", type=Path, help="directory of the run")
    sub.add_argument("--failed", action="store_true", help="the traceback of the first rank that failed")
    sub.add_argument("--no-follow", dest="follow", action="store_false", help="end with what is there now")
    sub = verb("stop", stop, "Let a run save and end, without a requeue.")
    sub.add_argument("run", type=Path, help="directory of the run")
    sub = verb("consolidate", consolidate, "Turn a run's newest whole checkpoint into an export.")
    sub.add_argument(
        "source",
        type=Path,
        metavar="RUN",
        help="directory of a run, or of an export, or one that DeepSpeed itself saved",
    )
    sub.add_argument("out", type=Path, metavar="OUT", help="directory of the export")
    sub.add_argument(
        "--form",
        choices=("compact", "dense", "onnx"),
        default="compact",
        help="compact: the learned parameters (default); dense: for plain transformers; onnx: the dense form as ONNX",
    )
    sub.add_argument("--no-head", action="store_true", help="leave out the MLM head")
    sub.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the tensors (default fp32)")
    sub.add_argument(
        "--average", type=int, default=1, metavar="K", help="the mean of the newest K checkpoints (default 1)"
    )
    sub.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="for a directory that DeepSpeed itself saved: an export, a run or a config.json of the same model",
    )
    sub.add_argument("--opset", type=int, metavar="N", help="for --form onnx: version of ONNX's operators (default 20)")
    sub = verb("import-authors", import_authors, "Turn a checkpoint folder of ShareBERT's authors into an export.")
    sub.add_argument("folder", type=Path, help="folder with config.json and pytorch_model.bin or one .safetensors")
    sub.add_argument("out", type=Path, help="directory of the export")
    sub = verb("evaluate", evaluate, "Fine-tune on a task of GLUE, or one of your own, and score.")
    sub.add_argument(
        "models",
        nargs="+",
        metavar="MODEL|key=value",
        help="an export, the folder of any Hugging Face encoder, random:FOLDER (the same architecture from new "
        "weights), majority, tfidf; and keys that win over the recipe",
    )
    sub.add_argument("--task", help="cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli, or a name for your own")
    sub.add_argument("--data", help="folder with {train,dev,test}.{tsv,csv,parquet,jsonl}; default: the hub")
    sub.add_argument("--recipe", help="path or shipped name of a recipe")
    sub.add_argument("--save", type=Path, metavar="OUT", help="keep the best fine-tuned classifier as an export")
    sub.set_defaults(schema="scoring.recipe:EvaluateRecipe", words_are="models")
    sub = verb("fill", fill, "Fill [MASK] in a text.")
    sub.add_argument("text", help="a text with [MASK]")
    sub.add_argument("export", type=Path, help="directory of an export")
    sub.add_argument("--top", type=int, default=5, help="words for each mask (default 5)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if arguments and {"-h", "--help"} & set(arguments[1:]):
        _add_keys_to_help(parser, arguments[0])
    given, later = parser.parse_known_args(arguments)
    if later and (not hasattr(given, "words_are") or any(word.startswith("-") for word in later)):
        parser.error(f"unrecognized arguments: {' '.join(later)}")
    if later:  # argparse takes words up to the first option; those behind it count as much
        getattr(given, given.words_are).extend(later)
    try:
        return int(given.verb(given))
    except Exception as error:
        if given.debug or not _is_bad_input(error):
            traceback.print_exc()
        print(f"sharebert: {error}", file=sys.stderr)
        return BAD_INPUT if _is_bad_input(error) else FAILED


def _is_bad_input(error: Exception) -> bool:
    model = sys.modules.get("sharebert")  # where it was not imported, it raised nothing
    return isinstance(error, BadInput) or (model is not None and isinstance(error, model.ShareBertError))


def _add_keys_to_help(parser: argparse.ArgumentParser, name: str) -> None:
    from importlib import import_module

    verbs = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    sub = verbs.get(name)
    if sub is not None and sub.get_default("schema"):
        module, _, attribute = sub.get_default("schema").partition(":")
        sub.epilog = "keys:\n" + describe(getattr(import_module(module), attribute))


if __name__ == "__main__":
    sys.exit(main())
