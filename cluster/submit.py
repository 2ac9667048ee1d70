"""Submit a training as a job, several as an array, or `sharebert prep` as arrays and a merge."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from cluster import requeue, scheduler
from cluster.agent import Agent
from cluster.allocation import Allocation
from cluster.folder import ClusterFolder, remember
from cluster.launch import Training, torchrun
from cluster.prep import PrepTask
from cluster.recipe import ClusterRecipe, minutes
from sharebert_common.errors import BadInput
from sharebert_common.files import make_folders
from sharebert_common.import_path import ROOT
from sharebert_common.recipe import to_yaml

YEAR_MINUTES = 365 * 24 * 60
"""Time limit of a local job that has none."""


class DatasetEntry(Protocol):
    """One dataset of a train recipe."""

    path: str
    """Folder or URL."""


class DataPart(Protocol):
    """The part `data` of a train recipe."""

    @property
    def dataset(self) -> Sequence[DatasetEntry]:
        """The datasets."""


class TrainRecipe(Protocol):
    """What a submission needs to know of a train recipe, which is the training's own business otherwise."""

    run: str
    """Directory of the run."""

    @property
    def data(self) -> DataPart:
        """What the run reads."""


def submit(train_recipes: Sequence[TrainRecipe], recipe: ClusterRecipe) -> list[tuple[Path, str]]:
    """Submit trainings: one as a job, several as an array of jobs that run independently.

    Args:
        train_recipes: resolved recipes; every attempt of a job uses its recipe as it is now.
        recipe: where they run.

    Returns: the directory of each run, and the id of its job.

    Raises BadInput where one of them is running or queued already, or SLURM refuses the job or does not answer.
    """
    trainings = [training_of(train_recipe, recipe) for train_recipe in train_recipes]
    folders = [ClusterFolder(training.run) for training in trainings]
    if recipe.launcher == "local" and len(folders) > 1:
        raise BadInput("several recipes: they would all run on this machine at once; submit each by itself")
    for folder in folders:
        _refuse_second_job(folder)
    if len({folder.run.resolve() for folder in folders}) < len(folders):
        raise BadInput("run: several recipes name the same directory; each needs one of its own")
    agents = [Agent(training) for training in trainings]
    parameters = sbatch_parameters(recipe, folders[0].run.name, folders[0].jobs)
    # The jobs may start at once, so their recipes are there before sbatch is asked. Where it refuses, everything is put
    # back: these runs have no job that could have read it, as far as SLURM knows.
    with ExitStack() as stack:
        for folder, train_recipe in zip(folders, train_recipes, strict=True):
            stack.enter_context(folder.prepared(to_yaml(train_recipe)))
        submitted = _submit(agents, recipe, folders[0].jobs, parameters)
    for folder, job in zip(folders, submitted, strict=True):
        job_folder = folders[0].jobs / job
        folder.add_submission(job=job, launcher=recipe.launcher, nodes=recipe.nodes, folder=str(job_folder))
        remember(folder.run)
    return [(folder.run, job) for folder, job in zip(folders, submitted, strict=True)]


def alive_job(run: Path) -> str | None:
    """What the job of a run does that waits or runs, in words; None where there is none.

    Raises BadInput where SLURM does not answer: the job may be alive.
    """
    folder = ClusterFolder(run)
    for entry in folder.submissions[-1:]:
        state = scheduler.state_of(entry["job"], entry["launcher"])
        if state == scheduler.UNKNOWN:
            raise BadInput(
                f"{run}: SLURM does not answer, and job {entry['job']} of this run may be alive; try again later, or, "
                f"where you know that it is over, delete {folder.path / 'submissions.jsonl'}"
            )
        if state in scheduler.ALIVE:
            return f"job {entry['job']} of this run is {state.lower()}"
    return None


def training_of(train_recipe: TrainRecipe, recipe: ClusterRecipe) -> Training:
    """A training from its resolved recipe, whose paths become absolute: a job may run in another folder."""
    train_recipe.run = str(Path(train_recipe.run).absolute())
    on_disk = [entry for entry in train_recipe.data.dataset if "://" not in entry.path]
    for entry in on_disk:
        entry.path = str(Path(entry.path).absolute())
    run = Path(train_recipe.run)
    _refuse_pattern(run)
    module = ("pretrain", str(ClusterFolder(run).recipe))
    return Training(run=run, module=module, datasets=tuple(Path(entry.path) for entry in on_disk), recipe=recipe)


def submit_prep(arguments: Sequence[str], output: Path, stages: int, recipe: ClusterRecipe) -> list[str]:
    """Submit `sharebert prep ARGUMENTS` as one array for each stage, with one task for each node, then the merge.

    A task does its share of the stages whose predecessors are complete, so each array completes at least one stage
    unless a task of it fails. The next array makes the parts that a failed task left out, and the merge those that
    are still missing.

    Args:
        arguments: of the command, without its `--task`.
        output: folder of the dataset.
        stages: how many stages need all parts of the stage before.
        recipe: where the tasks run. Its GPUs are not asked for.

    Returns: the ids of the arrays, and that of the merge.
    """
    recipe = replace(recipe, gpus_per_node=0)
    name, folder = f"prep-{output.name}", output.absolute().with_name(f"{output.name}.jobs")
    _refuse_pattern(folder)
    make_folders(folder)
    if recipe.launcher == "local":
        return _submit([PrepTask(tuple(arguments), recipe)], recipe, folder, {})  # one machine needs no shares
    tasks = [PrepTask((*arguments, f"--task={number}/{recipe.nodes}"), recipe) for number in range(recipe.nodes)]
    parameters = sbatch_parameters(recipe, name, folder) | {"nodes": 1}
    arrays: list[str] = []
    for _ in range(stages):
        arrays.append(_submit(tasks, recipe, folder, _after(parameters, arrays))[0].split("_")[0])
    return [*arrays, *_submit([PrepTask(tuple(arguments), recipe)], recipe, folder, _after(parameters, arrays))]


def dry_run(training: Training) -> str:
    """The batch script of a submission, and the commands of the agent on the first node."""
    from submitit.slurm.slurm import _make_sbatch_string

    recipe, jobs_folder = training.recipe, ClusterFolder(training.run).jobs
    nodes = ("FIRST_NODE", *(f"NODE_{number}" for number in range(2, recipe.nodes + 1)))
    allocation = Allocation("JOB_ID", 0, 0, nodes, jobs_folder / "JOB_ID", recipe.port or 0)
    line = shlex.join(torchrun(training, allocation)).replace("FIRST_NODE:0", "FIRST_NODE:PORT")
    workers = [f"export {name}={shlex.quote(str(value))}" for name, value in recipe.env.items()]
    torchrun_lines = ["# on each node, by the agent:", *recipe.setup, *workers, line]
    if recipe.launcher == "local":
        return "\n".join(torchrun_lines)
    parameters = sbatch_parameters(recipe, training.run.name, jobs_folder)
    command = f"{_python(recipe)} -u -m submitit.core._submit {shlex.quote(str(jobs_folder / '%j'))}"
    return "\n".join([_make_sbatch_string(command, jobs_folder / "%j", **parameters), *torchrun_lines])


def sbatch_parameters(recipe: ClusterRecipe, name: str, folder: Path) -> dict[str, Any]:
    """submitit's parameters for a job whose files lie in `folder`/ID."""
    given = {key.replace("-", "_"): value for key, value in recipe.sbatch.items()}
    dropped = {key for key, value in given.items() if value is None or value is False}
    options: dict[str, Any] = {"requeue": True, "mem": recipe.memory, "time": recipe.time} | given
    cpus = given.get("cpus_per_task", recipe.cpus_per_process * recipe.processes)
    srun = ["--kill-on-bad-exit=1", "--open-mode=append"]
    if cpus:  # since SLURM 22.05 srun does not take it from the job
        srun.append(f"--cpus-per-task={cpus}")
    box = recipe.container
    if box and box.kind == "pyxis":
        srun += [f"--container-image={box.image}", *box.options]
    before = [line.replace("FOLDER", shlex.quote(str(folder))) for line in requeue.BEFORE]
    parameters = {
        "job_name": name,
        "nodes": recipe.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        "gpus_per_node": recipe.gpus_per_node or None,
        "partition": recipe.partition,
        "account": recipe.account,
        "qos": recipe.qos,
        "constraint": recipe.constraint,
        "exclude": recipe.exclude,
        "time": None,  # below, as the recipe writes it; submitit's default is five minutes
        "wckey": None,
        "signal_delay_s": recipe.signal_s,
        "stderr_to_stdout": True,
        "setup": [*_exports(recipe), *before],
        "teardown": list(requeue.AFTER),
        "srun_args": srun,
        # these win in submitit
        "additional_parameters": {
            key: value for key, value in options.items() if value is not None and value is not False
        },
    }
    return parameters | dict.fromkeys(dropped & parameters.keys() - {"nodes", "ntasks_per_node"})


def _submit(
    calls: Sequence[Callable[[], object]], recipe: ClusterRecipe, folder: Path, parameters: dict[str, Any]
) -> list[str]:
    """Submit calls through submitit: one as a job, several as an array. Returns the ids."""
    from submitit import LocalExecutor, SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    files = folder / "%j"
    if recipe.launcher == "local":
        local = LocalExecutor(files, python=_python(recipe))
        limit = minutes(recipe.time) if recipe.time else YEAR_MINUTES
        local.update_parameters(
            timeout_min=limit,
            signal_delay_s=recipe.signal_s,
            gpus_per_node=recipe.gpus_per_node,
            stderr_to_stdout=True,
        )
        with _without_terminal(), _own_packages_first():
            return [local.submit(call).job_id for call in calls]
    try:
        executor = SlurmExecutor(files, python=_python(recipe))
    except RuntimeError as error:
        raise BadInput(
            "no srun on this machine: submit on a login node of a SLURM cluster, or run here with `--cluster local`"
        ) from error
    executor.update_parameters(**parameters)
    try:
        with executor.batch():
            submitted = [executor.submit(call) for call in calls]
    except (FailedJobError, FailedSubmissionError) as error:
        raise BadInput(f"sbatch refused the job: {' '.join(str(error).split())}") from error
    return [job.job_id for job in submitted]


# A job runs `python -m`, which would take a folder in the working directory for the package of that name. (Python 3.10
# does not know PYTHONSAFEPATH: there a folder with an `__init__.py` still hides a package.)


def _exports(recipe: ClusterRecipe) -> list[str]:
    """Lines of the batch script that let Python find this project's own packages; an image has its own."""
    if recipe.container is not None:
        return []
    lines = ["export PYTHONSAFEPATH=1"]
    if _is_checkout():
        lines.append(f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    return lines


@contextmanager
def _own_packages_first() -> Iterator[None]:
    """Processes that start inside find this project's own packages."""
    before = dict(os.environ)
    os.environ["PYTHONSAFEPATH"] = "1"
    if _is_checkout():
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), before.get("PYTHONPATH")]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _is_checkout() -> bool:
    """Whether the packages lie in a checkout; site-packages needs no help, and must not come before Python's own."""
    return (ROOT / "pyproject.toml").is_file()


@contextmanager
def _without_terminal() -> Iterator[None]:
    """Processes that start inside have no standard streams: a job must not keep the output of `submit` open."""
    kept = [os.dup(stream) for stream in (0, 1, 2)]
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        yield
    finally:
        for stream, copy in enumerate(kept):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)


def _python(recipe: ClusterRecipe) -> str:
    """The shell command that runs Python on a node."""
    box = recipe.container
    if box is None:
        return shlex.quote(sys.executable)
    if box.kind == "pyxis":
        return box.python
    gpus = ["--nv"] if recipe.gpus_per_node else []
    return shlex.join(["apptainer", "exec", *gpus, *box.options, box.image, box.python])


def _after(parameters: dict[str, Any], arrays: Sequence[str]) -> dict[str, Any]:
    """Parameters of a job that waits until the last array has ended, well or not."""
    return parameters | ({"dependency": f"afterany:{arrays[-1]}"} if arrays else {})


def _refuse_pattern(path: Path) -> None:
    """Raise BadInput where SLURM or submitit would put a job's number into a path."""
    if found := re.search(r"%[0-9%A-Za-z]", str(path)):
        raise BadInput(f"{path}: SLURM reads '{found[0]}' in a path as a pattern; use a path without '%'")


def _refuse_second_job(folder: ClusterFolder) -> None:
    if found := alive_job(folder.run):
        raise BadInput(f"{folder.run}: {found}; `sharebert stop {folder.run}` ends it")
