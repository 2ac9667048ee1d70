"""The verbs with their arguments, their help, and what a shell completes."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

from sharebert_cli import verbs
from sharebert_cli.arguments import CLUSTER_FLAGS, count, numbers, path, task
from sharebert_common.recipe import describe


def _with_config(parser: argparse.ArgumentParser, schema: str) -> None:
    """Give a verb the arguments `CONFIG [key=value ...]`, and to its `--help` the keys of `schema`, "module:class"."""
    parser.add_argument("config", help="path of a recipe, or the name of one that ships with the project")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that win over the recipe")
    parser.set_defaults(schema=schema, words_are="overrides")


def _with_cluster_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="any key of the cluster recipe, such as env.X=1"
    )


EXAMPLES = {
    "prep": "prep corpus source.paths=texts/*.txt output=data/corpus",
    "train": "train sharebert-small data.dataset=data/corpus run=runs/small",
    "cache-teacher": "cache-teacher sharebert-small data.micro_batch=32 data.row_length.first=null "
    "data.mask_schedule.last_rate=null distill=TEACHER distill.relations=1 distill.cache=data/teacher",
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
                        if word.type is path or word.dest in ("config", "words", "models"):
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
    sub_parsers = parser.add_subparsers(required=True, metavar="VERB", prog="sharebert")

    def verb(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
        sub = sub_parsers.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\nexample: sharebert {EXAMPLES[name]}" if name in EXAMPLES else summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show tracebacks, and warnings of libraries")
        sub.set_defaults(verb=run)
        return sub

    sub = verb("prep", verbs.prep, "Make a dataset from text.")
    _with_config(sub, "data_prep.recipe:PrepRecipe")
    sub.add_argument(
        "--task",
        type=task,
        metavar="I/N",
        help="do only the I-th of N shares of the work (I from 0); a last call without --task completes the dataset",
    )
    _with_config(verb("train", verbs.train, "Train in one process, or resume a run."), "pretrain.recipe:TrainRecipe")
    sub = verb(
        "cache-teacher",
        verbs.cache_teacher,
        "Run the teacher of a training once, and keep its outputs for students.",
    )
    _with_config(sub, "pretrain.recipe:TrainRecipe")
    sub.add_argument("--rows", type=count, metavar="N", help="rows of the run, from its first (default: all)")
    sub.add_argument(
        "--top-words",
        type=count,
        default=64,
        metavar="K",
        help="with distill.logits: keep the logits of the K likeliest words at a masked position (default 64)",
    )
    sub.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="of the numbers (default fp16)")
    sub = verb("sweep", verbs.sweep, "Train what a sweep recipe varies, or resume it, and compare the runs in a table.")
    _with_config(sub, "pretrain.sweep.recipe:SweepRecipe")
    sub.add_argument("--table", action="store_true", help="train nothing: the table of the runs as they are now")
    sub.add_argument("--submit", metavar="CLUSTER", help="submit the trainings as an array, with this cluster recipe")
    _with_cluster_keys(sub)
    sub = verb("plan", verbs.plan, "Estimate what a training costs: parameters, memory, FLOPs, hours.")
    _with_config(sub, "pretrain.recipe:TrainRecipe")
    sub.add_argument("--gpus", type=numbers(int), default=[8], metavar="N[,N ...]", help="numbers of GPUs (default 8)")
    sub.add_argument(
        "--gpu",
        type=lambda text: text.split(","),
        default=["h100"],
        metavar="KIND[,KIND ...]",
        help="kinds of GPU (default h100); several kinds or numbers give one table",
    )
    sub.add_argument(
        "--utilisation",
        type=numbers(float),
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
        verbs.submit,
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
    _with_cluster_keys(sub)
    sub.add_argument("--dry-run", action="store_true", help="print the job of a training, and submit nothing")
    sub.set_defaults(schema="cluster.recipe:ClusterRecipe", words_are="words")
    sub = verb("status", verbs.status, "Show how a run stands; without RUN, one line for each run that you submitted.")
    sub.add_argument("run", type=path, nargs="?", help="directory of the run")
    sub = verb("logs", verbs.logs, "Follow the log of rank 0 of a run, or show the rank that failed first.")
    sub.add_argument("run", type=path, help="directory of the run")
    sub.add_argument("--failed", action="store_true", help="show the traceback of the first rank that failed")
    sub.add_argument("--no-follow", dest="follow", action="store_false", help="print the log as it is now, and end")
    sub = verb("stop", verbs.stop, "Ask a submitted run to save and end, without a requeue.")
    sub.add_argument("run", type=path, help="directory of the run")
    sub = verb("report", verbs.report, "Write one page of what happened in a run, or in several side by side.")
    sub.add_argument("runs", nargs="+", type=path, metavar="RUN", help="directories of runs")
    sub.add_argument(
        "--out",
        type=path,
        default=Path("report.html"),
        metavar="FILE",
        help="an .html file, which needs no network, or an .md file (default report.html)",
    )
    sub = verb("consolidate", verbs.consolidate, "Turn a run's newest whole checkpoint into an export.")
    sub.add_argument(
        "source",
        type=path,
        metavar="RUN",
        help="directory of a run or of an export, or a checkpoint that DeepSpeed itself saved",
    )
    sub.add_argument("out", type=path, metavar="OUT", help="directory of the export")
    sub.add_argument(
        "--form",
        choices=("compact", "dense", "onnx"),
        default="compact",
        help="compact: the learned parameters (default); dense: for plain transformers; onnx: for ONNX Runtime, with "
        "shared matrices once",
    )
    sub.add_argument("--no-head", action="store_true", help="leave out the MLM head, or the classifier")
    sub.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the tensors (default fp32)")
    sub.add_argument(
        "--average", type=int, default=1, metavar="K", help="take the mean of the newest K checkpoints (default 1)"
    )
    sub.add_argument(
        "--ema", action="store_true", help="take the moving average of the weights of a run with optimizer.ema.decay"
    )
    sub.add_argument(
        "--config",
        type=path,
        metavar="PATH",
        help="for a checkpoint that DeepSpeed itself saved: an export, a run or a config.json of the same model",
    )
    sub.add_argument("--opset", type=int, metavar="N", help="for --form onnx: version of ONNX's operators (default 20)")
    sub = verb(
        "import-authors", verbs.import_authors, "Turn a checkpoint folder of ShareBERT's authors into an export."
    )
    sub.add_argument("folder", type=path, help="folder with config.json and pytorch_model.bin or one .safetensors")
    sub.add_argument("out", type=path, help="directory of the export")
    sub = verb("evaluate", verbs.evaluate, "Fine-tune on a task of GLUE or one of your own, and score.")
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
    sub.add_argument("--save", type=path, metavar="OUT", help="save the best fine-tuned classifier as an export")
    sub.set_defaults(schema="scoring.recipe:EvaluateRecipe", words_are="models")
    sub = verb("compress", verbs.compress, "Make an export smaller or faster, step by step, with a report after each.")
    sub.add_argument(
        "words",
        nargs="+",
        metavar="SOURCE RECIPE OUT [key=value ...]",
        help="folder of an export or of a Hugging Face encoder; a recipe, such as compress/int8; a new folder",
    )
    sub.add_argument("--check", action="store_true", help="compute the numbers of the report in OUT again")
    sub.set_defaults(help_text="compress.recipe:describe_all", words_are="words")
    sub = verb("compare", verbs.compare, "Train, compress and score the rows of a table, or resume it.")
    _with_config(sub, "comparison.recipe:CompareRecipe")
    wanted = sub.add_mutually_exclusive_group()
    wanted.add_argument("--table", action="store_true", help="make nothing: the table of what there is now")
    wanted.add_argument("--times", action="store_true", help="time all models again, as when nothing else runs")
    sub = verb("fill", verbs.fill, "Fill [MASK] in a text.")
    sub.add_argument("text", help="a text with [MASK]")
    sub.add_argument("export", type=path, help="directory of an export")
    sub.add_argument("--top", type=int, default=5, help="number of words for each mask (default 5)")
    return parser


def add_keys_to_help(parser: argparse.ArgumentParser, name: str) -> None:
    sub_parsers = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    sub = sub_parsers.get(name)
    if sub is None:
        return
    for default, text_of in (("schema", describe), ("help_text", lambda function: function())):
        if sub.get_default(default):
            module, _, attribute = sub.get_default(default).partition(":")
            sub.epilog = "keys:\n" + text_of(getattr(import_module(module), attribute))
