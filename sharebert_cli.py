"""The `sharebert` command: it parses arguments, and calls one function of a stage for each verb.

A verb imports its stage when it is called, so that `sharebert --help` imports no torch. Bad input is one line and
exit code 2; `--debug` adds the traceback.
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

from sharebert_common.errors import BAD_INPUT, FAILED, FINISHED, BadInput, CommandError
from sharebert_common.import_path import leave_working_directory
from sharebert_common.quiet import quiet_libraries
from sharebert_common.recipe import describe, load, split_words


def prep(given: argparse.Namespace) -> int:
    from data_prep.pipeline import PrepRecipe, prepare

    print(prepare(load(PrepRecipe, given.config, given.overrides), task=given.task))
    return FINISHED


def train(given: argparse.Namespace) -> int:
    from pretrain.__main__ import launch

    return launch(given.config, given.overrides, debug=given.debug)


def cache_teacher(given: argparse.Namespace) -> int:
    from pretrain.distill.cache_maker import CacheSettings, make_cache
    from pretrain.recipe import TrainRecipe

    recipe = load(TrainRecipe, given.config, given.overrides)
    print(make_cache(recipe, CacheSettings(given.rows, given.top_words, given.dtype)))
    return FINISHED


def plan(given: argparse.Namespace) -> int:
    from pretrain.plan.command import plan
    from pretrain.plan.estimate import PLAN_DEFAULTS, Assumptions
    from pretrain.recipe import TrainRecipe

    assumed = Assumptions(
        network_bytes_per_s=given.network_gbit * 1e9 / 8,
        price=given.price,
        **({"utilisations": given.utilisation} if given.utilisation else {}),
    )
    recipe = load(TrainRecipe, given.config, given.overrides, defaults=PLAN_DEFAULTS)
    print(plan(recipe, given.gpus, given.gpu, assumed, with_measure=given.measure, as_json=given.json))
    return FINISHED


def report(given: argparse.Namespace) -> int:
    from pretrain.report.report import report

    print(report(given.runs, given.out))
    return FINISHED


def sweep(given: argparse.Namespace) -> int:
    from pretrain.sweep.hparams import write_hparams
    from pretrain.sweep.recipe import SweepRecipe, trials
    from pretrain.sweep.runner import is_finished, refuse_other_keys, run_all
    from pretrain.sweep.table import rows_of, to_text
    from sharebert_common.files import make_folders, write_atomically

    recipe = load(SweepRecipe, given.config, given.overrides)
    made = trials(recipe)
    if not given.table:
        refuse_other_keys(made)
    if given.submit:
        from cluster.recipe import load_cluster
        from cluster.submit import alive_job
        from cluster.submit import submit as submit_trainings

        left = [trial.recipe for trial in made if not is_finished(trial) and not alive_job(trial.run)]
        if not left:
            print("every trial is finished, or has a job already")
            return FINISHED
        for run, job in submit_trainings(left, load_cluster(given.submit, [])):
            print(f"{run}: job {job}")
        return FINISHED
    code = FINISHED if given.table else run_all(made, lambda text: print(text, flush=True))
    runs: dict[str, list[Path]] = {}
    for trial in made:
        runs.setdefault(trial.row, []).append(trial.run)
    rows = rows_of(runs, recipe.reference)
    text = to_text(rows, unfinished=len(made) - sum(row.seeds for row in rows))
    make_folders(Path(recipe.folder))
    write_atomically(Path(recipe.folder) / "TABLE.md", text + "\n")
    write_hparams(made, Path(recipe.folder) / "tensorboard")
    print(text)
    return code


def consolidate(given: argparse.Namespace) -> int:
    from pretrain.export.consolidate import consolidate

    done = consolidate(
        given.source,
        given.out,
        form=given.form,
        head=not given.no_head,
        dtype=given.dtype,
        average=given.average,
        ema=given.ema,
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

    models, overrides = split_words(given.models, EvaluateRecipe)
    for key, value in (("task", given.task), ("data.path", given.data)):
        overrides += [] if value is None else [f"{key}={json.dumps(value)}"]
    print(evaluate(load(EvaluateRecipe, given.recipe, overrides), models, save=given.save))
    return FINISHED


def compress(given: argparse.Namespace) -> int:
    from compress.recipe import CompressRecipe

    words, overrides = split_words(given.words, CompressRecipe)
    if given.check:
        from compress.report import check

        if len(words) != 1 or overrides:
            raise BadInput("--check: takes one folder, the OUT of an earlier call")
        print(check(_path(words[0])))
        return FINISHED
    from compress.run import compress as run

    if len(words) != 3:
        raise BadInput("compress takes SOURCE RECIPE OUT, and key=value for what differs from the recipe")
    source, recipe, out = words
    print(run(_path(source), load(CompressRecipe, recipe, overrides), _path(out)))
    return FINISHED


def compare(given: argparse.Namespace) -> int:
    from comparison.recipe import CompareRecipe
    from comparison.run import compare

    recipe = load(CompareRecipe, given.config, given.overrides)
    code, text = compare(recipe, only_table=given.table, time_again=given.times)
    print(text)
    return code


def fill(given: argparse.Namespace) -> int:
    from exports.fill import fill

    for number, words in enumerate(fill(given.export, given.text, top=given.top), 1):
        print(f"mask {number}: " + "  ".join(f"{word} {probability:.3f}" for word, probability in words))
    return FINISHED


CLUSTER_FLAGS = {
    "nodes": "number of nodes; with --stage prep, number of tasks of the array",
    "gpus-per-node": "number of GPUs of each node",
    "procs-per-node": "number of processes of each node (default: one for each GPU)",
    "cpus-per-process": "number of CPU cores of each process",
    "time": "time limit, such as 24:00:00; a run that needs more time requeues itself",
    "partition": "partition of SLURM",
    "account": "account of SLURM",
    "qos": "quality of service of SLURM",
    "memory": "memory of each node, such as 64G",
    "constraint": "features that the nodes must have",
    "exclude": "nodes that the job must not use",
    "container": "container image that the job runs in",
}
"""Keys of a cluster recipe that have a flag of their own."""


def submit(given: argparse.Namespace) -> int:
    from cluster.recipe import load_cluster
    from cluster.submit import dry_run, submit_prep, training_of
    from cluster.submit import submit as submit_trainings

    keys = [flag.replace("-", "_") for flag in CLUSTER_FLAGS]
    from_flags = [f"{key}={_quoted(getattr(given, key))}" for key in keys if getattr(given, key) is not None]
    on = load_cluster(given.cluster, from_flags + given.set)
    if given.stage == "prep":
        from data_prep.pipeline import PrepRecipe
        from data_prep.stages import stage_names

        configs, overrides = split_words(given.words, PrepRecipe)
        if len(configs) != 1 or given.dry_run:
            raise BadInput("--stage prep: takes one recipe, and has no --dry-run")
        recipe = load(PrepRecipe, configs[0], overrides)
        stages = len(stage_names(recipe.clean))
        for job in submit_prep([configs[0], *overrides], Path(recipe.output), stages, on):
            print(f"{recipe.output}: job {job}")
        return FINISHED
    from pretrain.recipe import TrainRecipe

    configs, overrides = split_words(given.words, TrainRecipe)
    if not configs:
        raise BadInput("CONFIG: name a recipe; key=value alone is none")
    recipes = [load(TrainRecipe, config, overrides) for config in configs]
    for training in recipes:
        training.check(on.nodes * on.processes)
    if given.dry_run:
        print("\n\n".join(dry_run(training_of(recipe, on)) for recipe in recipes))
        return FINISHED
    for run, job in submit_trainings(recipes, on):
        print(f"{run}: job {job}")
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
    """The value of a flag as a YAML string: without quotes 24:00:00 would be a number."""
    return f'"{value}"'


def _path(text: str) -> Path:
    """A path; `~` is the home, also where the shell does not expand it, as in `--save=~/x`."""
    return Path(text).expanduser()


def _numbers(kind: type[int] | type[float]) -> Any:
    """A type of argparse: positive numbers with commas between them."""

    def parse(text: str) -> list[float]:
        numbers = [kind(part) for part in text.split(",")]
        if min(numbers) <= 0:
            raise argparse.ArgumentTypeError(f"'{text}': numbers above 0, with commas between them")
        return numbers

    parse.__name__ = "number"
    return parse


def _count(text: str) -> int:
    """A number above 0."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}': give a number above 0")
    return int(text)


def _task(text: str) -> tuple[int, int]:
    """The two numbers of `I/N`."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and int(number) < int(count)):
        raise argparse.ArgumentTypeError(f"'{text}': write I/N, with I from 0 to N-1")
    return int(number), int(count)


def _with_config(parser: argparse.ArgumentParser, schema: str) -> None:
    """Give a verb the arguments `CONFIG [key=value ...]`, and to its `--help` the keys of `schema`, "module:class"."""
    parser.add_argument("config", help="path of a recipe, or the name of one that ships with the project")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that win over the recipe")
    parser.set_defaults(schema=schema, words_are="overrides")


EXAMPLES = {
    "prep": "prep corpus source.paths=texts/*.txt output=data/corpus",
    "train": "train sharebert-small data.dataset=data/corpus run=runs/small",
    "cache-teacher": "cache-teacher sharebert-small data.micro_batch=32 data.row_length.first=null distill=TEACHER "
    "distill.relations=1 distill.cache=data/teacher",
    "plan": "plan sharebert-small --gpus 8,64 --gpu h100,a100",
    "submit": "submit sharebert-small run=/shared/runs/small --nodes 4 --gpus-per-node 8 --time 24:00:00",
    "status": "status /shared/runs/small",
    "logs": "logs /shared/runs/small",
    "stop": "stop /shared/runs/small",
    "report": "report runs/small --out small.html",
    "consolidate": "consolidate runs/small exports/small",
    "import-authors": "import-authors downloads/sharebert exports/authors",
    "evaluate": "evaluate exports/small --task sst2 --data glue/SST-2",
    "sweep": "sweep ladder",
    "compress": "compress exports/small compress/int8 exports/small-int8",
    "compare": "compare compare/table dataset=data/corpus folder=out/compare",
    "fill": "fill 'The capital of France is [MASK].' exports/small",
}
"""One example of each verb, shown in its help."""


class Complete(argparse.Action):
    """Print the script with which a shell completes verbs, flags and paths, and end."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        import shtab  # only here: `sharebert --help` does not wait for it

        if values not in ("bash", "zsh", "tcsh"):
            parser.error(f"--complete: '{values}': the shells are bash, zsh and tcsh")
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for sub in action.choices.values():
                    for word in sub._actions:
                        if word.type is _path or word.dest in ("config", "words", "models"):
                            word.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, values))
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """All verbs with their arguments."""
    parser = argparse.ArgumentParser(
        prog="sharebert",
        usage=argparse.SUPPRESS,  # without it, all verbs fit a screen of 24 lines
        description="Pretrain compact ShareBERT encoders. `sharebert VERB --help` shows keys and an example.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=20, width=100),
    )
    parser.add_argument(
        "--complete",
        action=Complete,
        metavar="SHELL",
        help="print the script that completes words in bash, zsh or tcsh",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB", prog="sharebert")

    def verb(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\nexample: sharebert {EXAMPLES[name]}" if name in EXAMPLES else summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show tracebacks, and warnings of libraries")
        sub.set_defaults(verb=run)
        return sub

    sub = verb("prep", prep, "Make a dataset from text.")
    _with_config(sub, "data_prep.recipe:PrepRecipe")
    sub.add_argument(
        "--task",
        type=_task,
        metavar="I/N",
        help="do only the I-th of N shares of the work (I from 0); a last call without --task completes the dataset",
    )
    _with_config(verb("train", train, "Train in one process, or resume a run."), "pretrain.recipe:TrainRecipe")
    sub = verb(
        "cache-teacher",
        cache_teacher,
        "Run the teacher of a training once, and keep its outputs for students.",
    )
    _with_config(sub, "pretrain.recipe:TrainRecipe")
    sub.add_argument("--rows", type=_count, metavar="N", help="rows of the run, from its first (default: all)")
    sub.add_argument(
        "--top-words",
        type=_count,
        default=64,
        metavar="K",
        help="with distill.logits: keep the logits of the K likeliest words at a masked position (default 64)",
    )
    sub.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="of the numbers (default fp16)")
    sub = verb("sweep", sweep, "Train what a sweep recipe varies, or resume it, and compare the runs in a table.")
    _with_config(sub, "pretrain.sweep.recipe:SweepRecipe")
    sub.add_argument("--table", action="store_true", help="train nothing: the table of the runs as they are now")
    sub.add_argument("--submit", metavar="CLUSTER", help="submit the trainings as an array, with this cluster recipe")
    sub = verb("plan", plan, "Estimate what a training costs: parameters, memory, FLOPs, hours.")
    _with_config(sub, "pretrain.recipe:TrainRecipe")
    sub.add_argument("--gpus", type=_numbers(int), default=[8], metavar="N[,N ...]", help="numbers of GPUs (default 8)")
    sub.add_argument(
        "--gpu",
        type=lambda text: text.split(","),
        default=["h100"],
        metavar="KIND[,KIND ...]",
        help="kinds of GPU (default h100); several kinds or numbers give one table",
    )
    sub.add_argument(
        "--utilisation",
        type=_numbers(float),
        metavar="U[,U ...]",
        help="shares of the GPU's peak that the run reaches (default 0.4,0.55,0.7)",
    )
    sub.add_argument(
        "--network-gbit", type=float, default=400.0, metavar="G", help="Gbit/s of each GPU to the others (default 400)"
    )
    sub.add_argument("--price", type=float, metavar="P", help="price of a GPU for an hour, in any currency")
    sub.add_argument("--json", action="store_true", help="print the plan as JSON")
    sub.add_argument("--measure", action="store_true", help="run a few steps here, and show them beside the plan")
    sub = verb(
        "submit",
        submit,
        "Submit trainings or prep to SLURM, or run them here, and keep them alive.",
    )
    sub.add_argument(
        "words",
        nargs="+",
        metavar="CONFIG [CONFIG ...] [key=value ...]",
        help="recipes (several make an array), and keys that win over them",
    )
    sub.add_argument("--cluster", default="slurm", help="cluster recipe: slurm, local, or a path (default slurm)")
    sub.add_argument("--stage", choices=("train", "prep"), default="train", help="stage of the recipe (default train)")
    for flag, summary in CLUSTER_FLAGS.items():
        sub.add_argument(f"--{flag}", help=summary)
    sub.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="any key of the cluster recipe, such as env.X=1"
    )
    sub.add_argument("--dry-run", action="store_true", help="print the job, and submit nothing")
    sub.set_defaults(schema="cluster.recipe:ClusterRecipe", words_are="words")
    sub = verb("status", status, "Show how a run stands; without RUN, one line for each run that you submitted.")
    sub.add_argument("run", type=_path, nargs="?", help="directory of the run")
    sub = verb("logs", logs, "Follow the log of rank 0 of a run, or show the rank that failed first.")
    sub.add_argument("run", type=_path, help="directory of the run")
    sub.add_argument("--failed", action="store_true", help="show the traceback of the first rank that failed")
    sub.add_argument("--no-follow", dest="follow", action="store_false", help="print the log as it is now, and end")
    sub = verb("stop", stop, "Ask a submitted run to save and end, without a requeue.")
    sub.add_argument("run", type=_path, help="directory of the run")
    sub = verb("report", report, "Write one page of what happened in a run, or in several side by side.")
    sub.add_argument("runs", nargs="+", type=_path, metavar="RUN", help="directories of runs")
    sub.add_argument(
        "--out",
        type=_path,
        default=Path("report.html"),
        metavar="FILE",
        help="an .html file, which needs no network, or an .md file (default report.html)",
    )
    sub = verb("consolidate", consolidate, "Turn a run's newest whole checkpoint into an export.")
    sub.add_argument(
        "source",
        type=_path,
        metavar="RUN",
        help="directory of a run or of an export, or a checkpoint that DeepSpeed itself saved",
    )
    sub.add_argument("out", type=_path, metavar="OUT", help="directory of the export")
    sub.add_argument(
        "--form",
        choices=("compact", "dense", "onnx"),
        default="compact",
        help="compact: the learned parameters (default); dense: for plain transformers; onnx: the dense form as ONNX",
    )
    sub.add_argument("--no-head", action="store_true", help="leave out the MLM head")
    sub.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the tensors (default fp32)")
    sub.add_argument(
        "--average", type=int, default=1, metavar="K", help="take the mean of the newest K checkpoints (default 1)"
    )
    sub.add_argument(
        "--ema", action="store_true", help="take the moving average of the weights of a run with optimizer.ema.decay"
    )
    sub.add_argument(
        "--config",
        type=_path,
        metavar="PATH",
        help="for a checkpoint that DeepSpeed itself saved: an export, a run or a config.json of the same model",
    )
    sub.add_argument("--opset", type=int, metavar="N", help="for --form onnx: version of ONNX's operators (default 20)")
    sub = verb("import-authors", import_authors, "Turn a checkpoint folder of ShareBERT's authors into an export.")
    sub.add_argument("folder", type=_path, help="folder with config.json and pytorch_model.bin or one .safetensors")
    sub.add_argument("out", type=_path, help="directory of the export")
    sub = verb("evaluate", evaluate, "Fine-tune on a task of GLUE or one of your own, and score.")
    sub.add_argument(
        "models",
        nargs="+",
        metavar="MODEL|key=value",
        help="an export, the folder of any Hugging Face encoder, random:FOLDER (the same architecture with new "
        "weights), majority, tfidf; and keys that win over the recipe",
    )
    sub.add_argument("--task", help="a task of GLUE (cola, sst2, …, wnli), blimp, probe, or your own name")
    sub.add_argument("--data", help="folder with {train,dev,test}.{tsv,csv,parquet,jsonl} (default: the hub)")
    sub.add_argument("--recipe", help="path or shipped name of a recipe")
    sub.add_argument("--save", type=_path, metavar="OUT", help="save the best fine-tuned classifier as an export")
    sub.set_defaults(schema="scoring.recipe:EvaluateRecipe", words_are="models")
    sub = verb("compress", compress, "Make an export smaller or faster, step by step, with a report after each.")
    sub.add_argument(
        "words",
        nargs="+",
        metavar="SOURCE RECIPE OUT [key=value ...]",
        help="folder of an export or of a Hugging Face encoder; a recipe, such as compress/int8; a new folder",
    )
    sub.add_argument("--check", action="store_true", help="compute the numbers of the report in OUT again")
    sub.set_defaults(help_text="compress.recipe:describe_all", words_are="words")
    sub = verb("compare", compare, "Train, compress and score the rows of a table, or resume it.")
    _with_config(sub, "comparison.recipe:CompareRecipe")
    wanted = sub.add_mutually_exclusive_group()
    wanted.add_argument("--table", action="store_true", help="make nothing: the table of what there is now")
    wanted.add_argument("--times", action="store_true", help="time all models again, as when nothing else runs")
    sub = verb("fill", fill, "Fill [MASK] in a text.")
    sub.add_argument("text", help="a text with [MASK]")
    sub.add_argument("export", type=_path, help="directory of an export")
    sub.add_argument("--top", type=int, default=5, help="number of words for each mask (default 5)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return BAD_INPUT
    if arguments and {"-h", "--help"} & set(arguments[1:]):
        _add_keys_to_help(parser, arguments[0])
    given, later = parser.parse_known_args(arguments)
    if later and (not hasattr(given, "words_are") or any(word.startswith("-") for word in later)):
        parser.error(f"unrecognized arguments: {' '.join(later)}")
    if later:  # argparse takes words only up to the first option
        getattr(given, given.words_are).extend(later)
    if not given.debug:
        quiet_libraries()
    try:
        return int(given.verb(given))
    except Exception as error:
        code = _exit_code(error)
        if given.debug or code == FAILED:
            traceback.print_exc()
        print(f"sharebert: {error}", file=sys.stderr)
        return code


def _exit_code(error: Exception) -> int:
    """The exit code for an error."""
    if isinstance(error, CommandError):
        return error.exit_code
    model = sys.modules.get("sharebert")  # where it was not imported, it raised nothing
    return BAD_INPUT if model is not None and isinstance(error, model.ShareBertError) else FAILED


def _add_keys_to_help(parser: argparse.ArgumentParser, name: str) -> None:
    from importlib import import_module

    verbs = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    sub = verbs.get(name)
    if sub is None:
        return
    for default, text_of in (("schema", describe), ("help_text", lambda function: function())):
        if sub.get_default(default):
            module, _, attribute = sub.get_default(default).partition(":")
            sub.epilog = "keys:\n" + text_of(getattr(import_module(module), attribute))


if __name__ == "__main__":
    leave_working_directory()
    sys.exit(main())
