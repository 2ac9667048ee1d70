"""The training loop of masked language modelling.

`train` surrounds it with the run directory and the process group; `Trainer.loop` is the algorithm, and
`Trainer.step` one global batch of it. The loss of a step is the mean over the masked tokens of all ranks
together, so that neither the number of ranks nor the accumulation changes it.
"""

from __future__ import annotations

import traceback

import torch

from data_prep.shards.reader import Dataset
from pretrain import distributed
from pretrain.checkpoint.identity import identity, report_changes
from pretrain.checkpoint.training_state import Saver, find_checkpoint
from pretrain.data.batches import MicroBatch
from pretrain.data.loader import Loader, StepBatch, micro_shape, open_datasets
from pretrain.distributed import World
from pretrain.engine.engine import (
    build_engine,
    check_zero,
    compile_layers,
    deepspeed_config,
    learning_rate,
    optimizer_step,
    scale_can_fall,
    set_learning_rate,
)
from pretrain.faults.detection import SkippedSteps, SlowRanks, SpikeDetector
from pretrain.faults.memory_probe import dry_run
from pretrain.faults.shard_check import ShardCheck
from pretrain.faults.skipping import BadRowsFile
from pretrain.faults.stop import StopRequest
from pretrain.faults.watchdog import Watchdog
from pretrain.model import (
    ModelChoice,
    build_model,
    choose_model,
    refuse_dropout_within_documents,
    refuse_other_tokenizer,
)
from pretrain.recipe import TrainRecipe
from pretrain.run.environment import environment
from pretrain.run.folder import RunFolder
from pretrain.run.meter import Meter
from pretrain.run.metric_log import Monitor
from pretrain.validate import refuse_nothing_to_validate, validate
from sharebert_common.errors import FINISHED, STOPPED, BadInput
from sharebert_common.recipe import plain, to_yaml


def train(recipe: TrainRecipe, world: World, stop: StopRequest) -> int:
    """Run, or go on with, the training of `recipe` on this process's share. Every rank calls this.

    Returns FINISHED, or STOPPED where a stop was asked for and the state saved.
    Raises BadInput where something given is wrong: Refused, on every rank, where all of them know.
    """
    run = RunFolder(recipe.run)
    if world.is_main:
        stop.watch(run.stop_file)
    try:
        datasets, choice = _accept(recipe, run, world)
        trainer = Trainer(recipe, run, world, stop, datasets, choice)
        with trainer.watchdog:
            return trainer.loop()
    except Exception as error:
        reason = traceback.format_exc().strip().splitlines()[-1]
        run.fail(reason, crash=not isinstance(error, BadInput))
        raise
    finally:
        run.release()


def _accept(recipe: TrainRecipe, run: RunFolder, world: World) -> tuple[list[Dataset], ModelChoice]:
    """Open and check everything that was given, before anything is built; a refusal reaches all ranks."""
    refusal, accepted = None, None
    try:
        check_zero(recipe.zero)
        if recipe.compile and recipe.zero.get("stage") == 3:
            raise BadInput("compile: not with zero.stage 3, which gathers weights while layers run; use stage 2")
        datasets = open_datasets(recipe.data)
        micro_shape(recipe.data, world.world_size)
        refuse_nothing_to_validate(datasets, recipe.validate)
        choice = choose_model(recipe.model, datasets[0].vocab_size, datasets[0].seq_len)
        refuse_other_tokenizer(choice, datasets[0])
        refuse_dropout_within_documents(choice, recipe.data.within_documents, world.device)
        if world.is_main:
            run.occupy()
        accepted = datasets, choice
    except BadInput as error:
        refusal = str(error)
    distributed.first_refusal(refusal)
    assert accepted is not None
    return accepted


class Trainer:
    """One launch of a run."""

    def __init__(
        self,
        recipe: TrainRecipe,
        run: RunFolder,
        world: World,
        stop: StopRequest,
        datasets: list[Dataset],
        choice: ModelChoice,
    ) -> None:
        self.recipe, self.run, self.world, self.stop = recipe, run, world, stop
        self.datasets = datasets
        self.shard_check = ShardCheck(datasets, world.rank, world.world_size)
        self.loader = Loader(datasets, recipe.data, recipe.seed, world.rank, world.world_size)
        self.bad_rows = BadRowsFile(run.bad_rows, world, self.report)
        self.skips = SkippedSteps(recipe.faults, self.bad_rows, self.report)
        self.spikes = SpikeDetector(recipe.faults.spike_deviations, self.report)
        self.hosts = distributed.hosts()
        self.slow_ranks = SlowRanks(recipe.faults.slow_factor, self.hosts, self.report)
        self.ours = identity(choice.config, datasets[0])
        found = find_checkpoint(run, world, self.ours, self.loader)
        torch.manual_seed(distributed.seed_of(recipe.seed, 0, world.rank))
        model = build_model(choice, recipe.seed)
        model.sharebert.recompute = recipe.recompute
        if recipe.compile:
            compile_layers(model)
        micro_batches, micro_rows = micro_shape(recipe.data, world.world_size)
        self.deepspeed_keys = deepspeed_config(
            zero=recipe.zero,
            precision=recipe.precision,
            clip=recipe.optimizer.clip,
            micro_batch=micro_rows,
            micro_batches=micro_batches,
            parameters=sum(p.numel() for p in model.parameters()),
        )
        self.engine = build_engine(model, self.deepspeed_keys, recipe.optimizer)
        self.saver = Saver(recipe.checkpoint, run, world, self.engine, self.loader, self.ours)
        if recipe.faults.dry_run and (found is None or found.step < recipe.steps):
            # Before the load: after one, ZeRO 3 would record an order of parameters that later steps do not keep.
            dry_run(self.engine, self.loader, self.forward, recipe.optimizer.clip)
        self.first_step = self.saver.load(found, recipe.seed) if found else 0
        self.meter = Meter(world, choice.config, datasets[0].seq_len, recipe.data, micro_rows, recipe.monitor)
        if world.is_main:
            self.start_run()
        self.monitor = Monitor(
            run, enabled=world.is_main, steps=recipe.steps, step=self.first_step, config_yaml=to_yaml(recipe)
        )
        self.watchdog = Watchdog(run, world, recipe.faults.hang_s)

    def start_run(self) -> None:
        """Note this launch in the run directory."""
        report_changes(self.run.config, plain(self.recipe), self.report)
        self.run.start(
            step=self.first_step,
            steps=self.recipe.steps,
            tokenizer=self.datasets[0].tokenizer_path,
            recipe_yaml=to_yaml(self.recipe),
            environment=environment(self.world.device, self.hosts) | {"deepspeed": self.deepspeed_keys},
        )

    def loop(self) -> int:
        """All optimizer steps that are left; an exit code."""
        step, steps = self.first_step, self.recipe.steps
        validate_every = self.recipe.validate.every
        if step == 0 and validate_every:
            self.score_held_out(step)
        stopping = save_due = False
        while step < steps and not stopping:
            self.bad_rows.pass_over(self.loader, self.recipe.data.global_batch)
            batch = next(self.loader)
            self.shard_check.raise_damage()
            step += 1
            stopping = self.step(step, batch)
            if self.skips.too_many:
                step, save_due = self.go_back(step), False
                continue
            if step % self.recipe.monitor.every == 0 or step == steps:
                self.log(step, batch)
            if validate_every and (step % validate_every == 0 or step == steps):
                self.score_held_out(step)
            save_due = save_due or step % self.recipe.checkpoint.every == 0
            # While steps are skipped the state may be what makes them fail: it is no good one to go back to.
            if (save_due and not self.skips.in_a_row) or step == steps or stopping:
                self.save(step)
                save_due = False
        return self.end(step)

    def step(self, step: int, batch: StepBatch) -> bool:
        """One optimizer step on this rank's share of a global batch. Returns whether any rank was asked to stop."""
        set_learning_rate(
            self.engine, learning_rate(step, self.recipe.steps, self.recipe.optimizer.lr, self.recipe.schedule)
        )
        sums = distributed.all_reduce_async(batch.masked, int(self.stop.asked))
        skipped = False
        for micro in batch.micro_batches:
            self.watchdog.at(f"step {step}, forward")
            with self.meter.own_work():
                loss_sum, correct = self.forward(micro)
            self.watchdog.at(f"step {step}, backward")
            masked, stops = sums()
            # DeepSpeed averages gradients over the ranks; times ranks, over the masked tokens of all of
            # them, that average is the gradient of the global mean.
            self.engine.backward(loss_sum * (self.world.world_size / masked), scale_wrt_gas=False)
            skipped = optimizer_step(self.engine, self.recipe.optimizer.clip)
            self.meter.add(loss_sum, correct)
        self.meter.end_step(batch, skipped=skipped)
        rows = range(batch.rows_consumed - self.recipe.data.global_batch, batch.rows_consumed)
        self.skips.count(step, rows, skipped and not scale_can_fall(self.engine))
        self.watchdog.at(f"step {step} done, next rows")
        return stops > 0

    def forward(self, micro: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the losses and number of right words over the masked tokens of a micro-batch, fp32 scalars."""
        micro = micro.to(self.world.device)
        within = self.recipe.data.within_documents
        output = self.engine(
            micro.tokens,
            # With a mask in some steps and none in others a compiled layer would be two.
            attention_mask=micro.document_ids if (micro.padded or self.recipe.compile) and not within else None,
            document_ids=micro.document_ids if within else None,
            positions=micro.positions,
            labels=micro.labels,
            loss_weights=micro.loss_weights,
        )
        return output.loss_sum, output.correct

    def log(self, step: int, batch: StepBatch) -> None:
        """Log the interval that ends with `step`."""
        line = self.meter.read(step, self.engine, batch)
        if line["loss"] is not None:
            line["loss_deviations"] = self.spikes.look(step, line["loss"])
        line["slowest_rank_factor"] = self.slow_ranks.look(step, self.meter.own_work_s)
        self.monitor.line(line)
        if self.world.is_main:
            self.run.note_progress(step)

    def score_held_out(self, step: int) -> None:
        """Validate, and log it."""
        self.watchdog.at(f"validation after step {step}")
        self.engine.eval()
        loss, accuracy = validate(
            self.forward,
            self.datasets,
            self.recipe.validate,
            mask_rate=self.recipe.data.mask_rate,
            whole_word=self.recipe.data.whole_word,
            rank=self.world.rank,
            world_size=self.world.world_size,
        )
        self.engine.train()
        self.monitor.line({"step": step, "valid_loss": loss, "valid_accuracy": accuracy})
        self.meter.skip_time()

    def save(self, step: int) -> None:
        """Start to save; waits for a save before it that is still being written."""
        with self.watchdog.patient(f"checkpoint of step {step}", self.recipe.checkpoint.write_timeout_s):
            self.saver.save(step)

    def go_back(self, step: int) -> int:
        """Return from `step` to the newest whole checkpoint, to pass over the rows that failed. Returns its step.

        Raises TooManyFaults where that makes no sense.
        """
        with self.watchdog.patient("going back", self.recipe.checkpoint.write_timeout_s):
            self.saver.finish()
            found = find_checkpoint(self.run, self.world, self.ours, self.loader)
            self.skips.give_up_rows(step, found)
            assert found is not None
            self.saver.load(found, self.recipe.seed)
        self.meter.reset()
        self.monitor.go_back(found.step)
        return found.step

    def end(self, step: int) -> int:
        """Wait for the last save, end what runs beside the training, and say how the run stands; an exit code."""
        with self.watchdog.patient("the last checkpoint", self.recipe.checkpoint.write_timeout_s):
            saved = self.saver.finish()
        self.loader.close()
        self.shard_check.close()
        self.monitor.close()
        finished = step == self.recipe.steps
        if finished and not saved:
            raise OSError(f"the checkpoint of step {step}, the last one, could not be written; start the run again")
        if self.world.is_main:
            reason = self.stop.reason if saved else f"{self.stop.reason}; the checkpoint could not be written"
            self.run.write_state("finished" if finished else "stopped", step=step, reason="" if finished else reason)
        return FINISHED if finished else STOPPED

    def report(self, text: str) -> None:
        """A line for people, once for all ranks."""
        if self.world.is_main:
            self.run.say(text)
