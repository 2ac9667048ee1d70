"""What each verb does: one function that calls its stage, and gives an exit code.

A verb imports its stage when it is called, so that `sharebert --help` imports no torch.
"""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from pathlib import Path

from sharebert_cli.arguments import CLUSTER_FLAGS, path, quoted
from sharebert_common.errors import FINISHED, BadInput
from sharebert_common.recipe import load, split_words


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
    from pretrain.sweep.recipe import SweepRecipe, trials
    from pretrain.sweep.runner import is_finished, refuse_other_keys, run_all
    from pretrain.sweep.summary import summarise

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
        for run, job in submit_trainings(left, load_cluster(given.submit, given.set)):
            print(f"{run}: job {job}")
        return FINISHED
    code = FINISHED if given.table else run_all(made, lambda text: print(text, flush=True))
    print(summarise(recipe, made))
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
        print(check(path(words[0])))
        return FINISHED
    from compress.run import compress as run

    if len(words) != 3:
        raise BadInput("compress takes SOURCE RECIPE OUT, and key=value for what differs from the recipe")
    source, recipe, out = words
    print(run(path(source), load(CompressRecipe, recipe, overrides), path(out)))
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


def submit(given: argparse.Namespace) -> int:
    from cluster.recipe import load_cluster
    from cluster.submit import dry_run, submit_prep, training_of
    from cluster.submit import submit as submit_trainings

    keys = [flag.replace("-", "_") for flag in CLUSTER_FLAGS]
    from_flags = [f"{key}={quoted(getattr(given, key))}" for key in keys if getattr(given, key) is not None]
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
