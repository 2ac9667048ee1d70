"""The training loop.

`train` surrounds it with the run directory and the process group. `Trainer.loop` is the algorithm, and `Trainer.step`
one global batch of it. What the loss is, the objective says. The loss of a step is the mean over the masked tokens of
all ranks together, so that neither the world size nor gradient accumulation changes it.
"""

from __future__ import annotations

import contextlib
import traceback
from typing import Any

import torch

from pretrain import distributed
from pretrain.checkpoint.format import Checkpoint
from pretrain.checkpoint.identity import identity, report_changes
from pretrain.checkpoint.training_state import TrainingState, find_checkpoint
from pretrain.data.loader import Loader, StepBatch
from pretrain.distill.cached_teacher import CachedTeacher
from pretrain.distill.objective import Distillation
from pretrain.distill.teacher import Teacher, load_teacher
from pretrain.distributed import World
from pretrain.engine.config import deepspeed_config, refuse_fp16_without_cuda
from pretrain.engine.engine import open_engine
from pretrain.engine.numerics import set_numerics
from pretrain.engine.optimizer import learning_rate
from pretrain.faults.detection import SlowRanks, SpikeDetector
from pretrain.faults.memory_probe import probe_memory
from pretrain.faults.shard_check import ShardCheck
from pretrain.faults.skipping import BadRowsFile, SkippedSteps
from pretrain.faults.stop import StopRequest
from pretrain.faults.watchdog import Watchdog
from pretrain.model import build_model, compile_layers, refuse_dropout_within_documents
from pretrain.objective import MaskedLanguageModelling, Objective
from pretrain.plan.fit import settle_micro_batch
from pretrain.recipe import ResolvedTraining, TrainRecipe
from pretrain.run.environment import environment
from pretrain.run.folder import RunFolder
from pretrain.run.introduction import introduction
from pretrain.run.look import Looker
from pretrain.run.meter import Meter
from pretrain.run.metric_log import MetricLog
from pretrain.run.profiles import profiled
from pretrain.validate import validate
from sharebert_common.errors import FINISHED, STOPPED, BadInput
from sharebert_common.recipe import plain, to_yaml


def train(recipe: TrainRecipe, world: World, stop: StopRequest) -> int:
    """Run, or resume, the training of `recipe` on this process's share. Every rank calls this.

    Returns FINISHED, or STOPPED where a stop was asked for and the state is saved.
    Raises BadInput where something given is wrong: Refused, on every rank, where all of them know.
    """
    run = RunFolder(recipe.run)
    if world.is_main:
        stop.watch(run.stop_file)
    try:
        recipe, training = settle_micro_batch(recipe, accept(recipe, run, world), world)
        with Trainer(recipe, run, world, stop, training) as trainer:
            return trainer.loop()
    except Exception as error:
        reason = traceback.format_exc().strip().splitlines()[-1]
        run.fail(reason, crash=not isinstance(error, BadInput))
        raise
    finally:
        run.release()


def accept(recipe: TrainRecipe, run: RunFolder, world: World) -> ResolvedTraining:
    """Check everything that was given, before anything is built; a refusal reaches all ranks. A collective."""
    with distributed.refused_by_all():
        training = recipe.resolve(world.world_size)
        refuse_fp16_without_cuda(recipe.precision, world.device)
        if recipe.data.within_documents:
            refuse_dropout_within_documents(training.model, training.seq_len, world.device)
        if world.is_main:
            run.occupy()
    return training


def make_objective(recipe: TrainRecipe, training: ResolvedTraining, device: torch.device) -> Objective:
    """What a step minimises. Raises BadInput where a teacher cannot be loaded."""
    within = recipe.data.within_documents
    mlm = MaskedLanguageModelling(device, within_documents=within, one_graph=recipe.compile)
    if training.distill is None:
        return mlm
    teacher: Teacher
    if training.teacher_cache is not None:
        teacher = CachedTeacher(training.distill, training.teacher_cache.score_scale)
    else:
        teacher = load_teacher(training.distill, device, within_documents=within, precision=recipe.precision)
    return Distillation(mlm, teacher)


def refuse_fewer_steps(recipe: TrainRecipe, found: Checkpoint | None) -> None:
    """Raise Refused where the run has made more steps than it is to have. Every rank knows `found`."""
    if found is not None and found.step > recipe.steps:
        raise distributed.Refused(
            f"steps: {recipe.steps}, and the newest checkpoint of {recipe.run} is of step {found.step}; give "
            f"{found.step} or more, or delete the checkpoints after the one to resume from"
        )


class Trainer:
    """One attempt at a run. Entering builds everything and loads the newest checkpoint; `loop` trains."""

    def __init__(
        self, recipe: TrainRecipe, run: RunFolder, world: World, stop: StopRequest, training: ResolvedTraining
    ) -> None:
        self.recipe, self.run, self.world, self.stop, self.training = recipe, run, world, stop, training
        self.identity = identity(training.model.config, training.datasets[0])
        with distributed.refused_by_all():
            self.loader = Loader(
                training.datasets,
                recipe.data,
                recipe.seed,
                world.rank,
                world.world_size,
                recipe.steps,
                beside=training.teacher_cache,
            )
            self.objective: Objective = make_objective(recipe, training, world.device)
        self.shard_check = ShardCheck(training.datasets, world.rank, world.world_size, run.say)
        self.bad_rows = BadRowsFile(run.bad_rows, world, self.report)
        self.skips = SkippedSteps(recipe.faults, self.bad_rows, self.report)
        self.spikes = SpikeDetector(recipe.faults.spike_deviations, self.report)
        self.metric_log = MetricLog(run, enabled=world.is_main, steps=recipe.steps)
        self.watchdog = Watchdog(run, world, recipe.faults.hang_s)
        self.meter = Meter(
            world, training.model.config, training.seq_len, recipe.data, training.micro_rows, recipe.monitor
        )
        self.looker: Looker | None = None
        self.looks = recipe.monitor.look and recipe.zero.stage < 3 and world.is_main
        self._at_step, self._look_failed = 0, False
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Trainer:
        """Build the engine, resume, and start what runs beside the training. A collective."""
        recipe, training = self.recipe, self.training
        with contextlib.ExitStack() as opened:
            opened.push(lambda kind, *_: self.loader.close(wait=kind is None))  # an error must not wait for storage
            opened.enter_context(self.shard_check)
            self.bad_rows.read()
            for entry in self.bad_rows.entries:
                self.loader.skip(entry.rows)
            self.hosts = distributed.hosts()
            self.slow_ranks = SlowRanks(recipe.faults.slow_factor, self.hosts, self.report)
            found = find_checkpoint(
                self.run,
                self.world,
                self.identity,
                self.loader.check_state,
                or_none=recipe.checkpoint.restart_if_unreadable,
            )
            refuse_fewer_steps(recipe, found)
            attention_dropout = training.model.config.attention_probs_dropout_prob
            set_numerics(attention_dropout, deterministic=recipe.deterministic)
            torch.manual_seed(distributed.seed_of(recipe.seed, 0, self.world.rank))
            with distributed.refused_by_all():
                model = build_model(training.model, recipe.seed, recipe.quantise, training.distill)
            model.sharebert.recompute = recipe.recompute
            if recipe.compile:
                compile_layers(model)
            self.deepspeed_keys = deepspeed_config(
                zero=recipe.zero,
                precision=recipe.precision,
                clip=recipe.optimizer.clip,
                micro_batch=training.micro_rows,
                micro_batches=training.micro_batches,
                parameters=sum(p.numel() for p in model.parameters()),
            )
            self.engine = open_engine(
                model, self.deepspeed_keys, recipe.optimizer, timeout_s=recipe.collective_timeout_s
            )
            self.state = TrainingState(
                recipe.checkpoint,
                self.run,
                self.world,
                self.engine,
                self.loader,
                self.meter,
                self.identity,
                self.metric_log.sync,
            )
            self.state.open()
            if recipe.faults.memory_probe and (found is None or found.step < recipe.steps):
                # Before the load: after one, ZeRO 3 would record an order of parameters that later steps do not keep.
                probe_memory(self.engine, self.loader, self.objective)
            self.first_step = self.state.load(found, recipe.seed) if found else self.state.begin()
            self.start_run()
            self.metric_log.open(self.first_step, self.recipe_text())
            self.metric_log.event(self.first_step, f"resumed from step {self.first_step}" if found else "started")
            opened.callback(self.metric_log.close)
            self.watchdog.__enter__()
            self._open = opened.pop_all()
        return self

    def __exit__(self, *raised: Any) -> None:
        """End what runs beside the training, the watchdog at the very last."""
        try:
            self._open.__exit__(*raised)
        finally:
            self.watchdog.__exit__(*raised)

    def start_run(self) -> None:
        """Note this attempt in the run directory, and say what it is."""
        if self.world.is_main:
            self.run.say(introduction(self.recipe, self.training, self.first_step, self.world.world_size))
            report_changes(self.run.config, plain(self.recipe), self.report)
            self.run.start(
                step=self.first_step,
                steps=self.recipe.steps,
                tokenizer=self.training.datasets[0].tokenizer_path,
                recipe_yaml=self.recipe_text(),
                environment=environment(self.world.device, self.hosts) | {"deepspeed": self.deepspeed_keys},
            )

    def recipe_text(self) -> str:
        """The recipe with all of its keys, below what was picked for `auto`."""
        picked = self.training.picked
        return (f"# {picked}\n" if picked else "") + to_yaml(self.recipe)

    def loop(self) -> int:
        """Make all optimizer steps that are left; an exit code."""
        step, steps = self.first_step, self.recipe.steps
        validate_every = self.recipe.validate.every
        self.meter.start_clock()
        if step == 0 and validate_every:
            self.validate(step)
        stopping = save_due = False
        while step < steps and not stopping:
            batch = next(self.loader)
            self.shard_check.raise_damage()
            step += 1
            self._at_step = step
            with profiled(self.run.path, step, wanted=self.world.is_main and step in self.recipe.monitor.profile):
                stopping = self.step(step, batch)
            if self.skips.too_many:
                step, save_due = self.return_to_checkpoint(step), False
                continue
            if step % self.recipe.monitor.every == 0 or step == steps:
                self.log(step, batch)
            if validate_every and (step % validate_every == 0 or step == steps):
                self.validate(step)
            save_due = save_due or step % self.recipe.checkpoint.every == 0
            # While steps are skipped, the state may be what makes them fail: not one to return to.
            if (save_due and not self.skips.in_a_row) or step == steps or stopping:
                self.save(step)
                save_due = False
        return self.end(step)

    def step(self, step: int, batch: StepBatch) -> bool:
        """One optimizer step on this rank's share of a global batch. Returns whether any rank was asked to stop."""
        self.engine.learning_rate = learning_rate(
            step, self.recipe.steps, self.recipe.optimizer.lr, self.recipe.schedule
        )
        sums = distributed.all_reduce_async(batch.masked, int(self.stop.asked))
        skipped = False
        for micro in batch.micro_batches:
            self.watchdog.at(f"step {step}, forward")
            with self.meter.own_work():
                losses = self.objective(self.engine, micro)
            self.watchdog.at(f"step {step}, backward")
            with self.meter.waiting_for("ranks"):
                masked, stops = sums()
            # DeepSpeed averages gradients over the ranks. Times the world size, over the masked tokens of all ranks,
            # that average is the gradient of the global mean.
            # (Rows of [UNK] alone have none: the loss is 0.)
            self.engine.backward(losses.loss * (self.world.world_size / max(1, masked)))
            skipped = self.engine.step()
            self.meter.add(losses)
        self.meter.end_step(batch, skipped=skipped)
        self.skips.count(step, batch.rows, skipped and not self.engine.loss_scale_can_fall)
        self.watchdog.at(f"step {step} done, next rows")
        return stops > 0

    def log(self, step: int, batch: StepBatch) -> None:
        """Log the interval that ends with `step`."""
        line = self.meter.read(step, self.engine, batch)
        if line["loss"] is not None:
            line["loss_deviations"] = self.spikes.look(step, line["loss"])
        line["slowest_rank_factor"] = self.slow_ranks.look(step, self.meter.own_work_s)
        self.metric_log.line(line)
        if self.world.is_main:
            self.run.note_progress(step)

    def validate(self, step: int) -> None:
        """Score the held-out rows, and log the result."""
        place = f"validation after step {step}"
        self.watchdog.at(place)
        self.engine.eval()
        with self.engine.averaged() if self.recipe.validate.ema else contextlib.nullcontext(False) as averaged:
            loss, accuracy = validate(
                self.objective,
                self.engine,
                self.training.datasets,
                self.recipe.validate,
                mask_rate=self.recipe.data.last_mask_rate,
                whole_word=self.recipe.data.whole_word,
                weights=[entry.weight for entry in self.recipe.data.dataset],
                rank=self.world.rank,
                world_size=self.world.world_size,
                progress=lambda *given: self.watchdog.at_each(place, self.metric_log.progress(*given)),
            )
            self.watchdog.at(f"{place} done")
            line = {"step": step, "valid_loss": loss, "valid_accuracy": accuracy, "valid_of_average": averaged or None}
            self.metric_log.line(line)
            if self.looks:
                self.look(step)
        self.watchdog.at(f"{place} and look done")
        self.engine.train()
        self.meter.skip_time()

    def look(self, step: int) -> None:
        """Show the model in TensorBoard. Where that fails, it is said once: the other ranks train on without it."""
        try:
            if self.looker is None:
                self.looker = Looker(self.training.datasets[0].tokenizer_path, self.recipe.monitor.sentences)
            self.metric_log.look(self.looker.look(step, self.engine.module))
        except Exception as error:  # weights that are not finite have no singular values, for instance
            if not self._look_failed:
                first_line = str(error).partition("\n")[0]
                self.report(f"step {step}: no look into the model ({type(error).__name__}: {first_line})")
            self._look_failed = True

    def save(self, step: int) -> None:
        """Start to save. Waits for an earlier save that is still being written."""
        with (
            self.watchdog.patient(f"checkpoint of step {step}", self.recipe.checkpoint.write_timeout_s),
            self.meter.waiting_for("saves"),
        ):
            self.state.save(step)

    def return_to_checkpoint(self, step: int) -> int:
        """Return from `step` to the newest whole checkpoint, and skip the rows that failed. Returns its step.

        Raises TooManyFaults where that makes no sense.
        """
        with self.watchdog.patient("returning to a checkpoint", self.recipe.checkpoint.write_timeout_s):
            self.state.finish()
            found = find_checkpoint(self.run, self.world, self.identity, self.loader.check_state, or_none=True)
            self.loader.skip(self.skips.give_up_rows(step, found))
            assert found is not None
            self.state.load(found, self.recipe.seed)
        self.metric_log.return_to(found.step)
        self.metric_log.event(found.step, f"returned from step {step} to the checkpoint of step {found.step}")
        return found.step

    def end(self, step: int) -> int:
        """Wait for the last save, end what runs beside the training, and note how the run stands; an exit code."""
        with self.watchdog.patient("the last checkpoint", self.recipe.checkpoint.write_timeout_s):
            finished = step == self.recipe.steps
            # A signal reaches the ranks one after another: rank 0 may not have it yet.
            reason = "" if finished else distributed.first_text(self.stop.reason) or "asked"
            saved = self.state.finish()
            self.metric_log.event(step, "finished" if finished else f"stopped: {reason}")
            self._open.close()
        if finished and not saved:
            raise OSError(f"the checkpoint of step {step}, the last one, could not be written; start the run again")
        if self.world.is_main:
            note = "" if saved else "; the checkpoint could not be written"
            self.run.end("finished" if finished else "stopped", step=step, reason=reason + note)
        return FINISHED if finished else STOPPED

    def report(self, text: str) -> None:
        """A line for people, once for all ranks."""
        if self.world.is_main:
            self.run.say(text)
            self.metric_log.event(self._at_step, text)
