"""`make soak`: an unattended training with many injected faults, compared with the same training without faults.

Faults are injected into a demo-size training at random moments. Whenever an attempt ends, the same command starts the
next attempt, until the training is finished. There are two campaigns, each with its own undisturbed run:

    elastic   the world size (1 to 3), the ZeRO stage and the micro-batch change many times, without dropout: every
              loss must be within 2e-6 (relative) of the loss of the undisturbed run, which has one rank
    exact     two ranks, with dropout: every loss must be bitwise equal to that of the undisturbed run

For each kind of fault, the table shows how many were injected, how many the run survived (it came to a later step than
before), and how many optimizer steps they cost: steps that were in the log and had to be repeated. The exit code is 0
only if at least 40 faults were injected (or the number asked for, if lower), the run survived all of them, and the
losses are as promised.

    python -m benchmarks.faults [--faults 44] [--minutes 15] [--seed 0]

The full disk is a tmpfs of 16 MiB that holds the run. To mount it one must be root. Calls that fail, and a clock that
is set back, need a C compiler (`failing_calls.py`). Faults that cannot be injected are left out, and a line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import psutil

from benchmarks.failing_calls import FailingCalls, NoCompiler, compile_shim
from benchmarks.faulty_run import EVERY, VALIDATE_EVERY, Run, make_dataset, wait_until

ENOUGH = 40
"""The fewest faults that count as a pass: on a slow machine the time may be over before all are injected."""
STEPS_A_FAULT = 18
"""The steps of a run for each fault; the run has two times more of them, which pass without a fault."""
LONGEST_CALM = 12
"""The most steps from the recovery after a fault to the next fault."""
START_S = 12.0
"""About the time of an attempt before its first step."""
STALL_S = 180.0
"""A run that makes no step for this long after a fault did not survive it."""
TRIED_AGAIN = b"it is tried again in"
"""Part of the message of the checkpoint writer after a failed write."""
DISK_BYTES = 16 << 20
SUSPENDED_S = 25.0
"""Longer than `faults.hang_s` of the run."""
ELASTIC = 2e-6
"""The largest relative difference of losses in the elastic campaign."""
WORLDS = [(2, 1, 8), (1, 3, 6), (3, 2, 8), (2, 0, 12), (1, 2, 24), (3, 3, 4)]
"""World size, ZeRO stage, micro-batch."""


# Each function below injects one fault into a run that is alive, at a random moment, and returns.


def kill_a_rank(run: Run, chance: random.Random) -> None:
    run.send(signal.SIGKILL, [chance.choice(run.workers())])


def kill_the_launcher(run: Run, chance: random.Random) -> None:
    assert run.process is not None
    run.process.kill()
    run.process.wait()


def kill_all(run: Run, chance: random.Random) -> None:
    run.kill_group()


def kill_all_while_it_starts(run: Run, chance: random.Random) -> None:
    """An attempt may die anywhere in its start, also while it loads the checkpoint, without any effect."""
    run.kill_group()
    run.launch()
    wait_until(lambda: run.ended, chance.random() * START_S)
    run.kill_group()


def kill_all_in_a_save(run: Run, chance: random.Random) -> None:
    wait_until(lambda: list(run.folder.glob("checkpoints/.step-*")) or run.ended, 30)
    time.sleep(chance.random() * 0.01)
    run.kill_group()


def kill_all_in_a_validation(run: Run, chance: random.Random) -> None:
    def is_due() -> bool:
        return run.step % VALIDATE_EVERY == 0 and "loss" in run.last_line

    wait_until(lambda: is_due() or run.ended, 30)
    time.sleep(chance.random() * 0.1)
    run.kill_group()


def damage_the_newest_checkpoint(run: Run, chance: random.Random) -> None:
    run.kill_group()
    newest = run.newest_checkpoint()
    if newest is None:
        return
    file = chance.choice(sorted(newest.iterdir()))
    kind = chance.choice(("cut", "flipped", "missing"))
    if kind == "missing":
        file.unlink()
    elif kind == "cut":
        os.truncate(file, chance.randrange(file.stat().st_size))
    else:
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)


def cut_a_shard(run: Run, chance: random.Random) -> None:
    """The ranks end with an error that names the shard; then the whole shard is put back."""
    shard = chance.choice(sorted(run.dataset.glob("train/*.tar")))
    whole = shard.read_bytes()
    world_size = run.workers()
    os.truncate(shard, chance.randrange(len(whole)))
    wait_until(lambda: run.ended or run.workers() != world_size, 60)
    copy = shard.with_suffix(".copy")
    copy.write_bytes(whole)
    copy.replace(shard)


def fill_the_disk(run: Run, chance: random.Random) -> None:
    """The disk is full until the write of a checkpoint has failed; then there is room for the next checkpoints."""
    filler, failed = run.folder.parent / "filler", run.said.read_bytes().count(TRIED_AGAIN)
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(4096))
    wait_until(lambda: run.said.read_bytes().count(TRIED_AGAIN) > failed or run.ended, 30)
    time.sleep(chance.random())
    filler.unlink()
    until = run.step + EVERY
    wait_until(lambda: run.step >= until or run.ended, 30)


def signals_in_bursts(run: Run, chance: random.Random) -> None:
    """Stop signals of all kinds to the ranks, and in half of the cases TERM to the launcher, which passes it on."""
    world_size = run.workers()
    launcher = [run.process.pid] if run.process and chance.random() < 0.5 else []
    while not run.ended:
        run.send(chance.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)), world_size)
        run.send(signal.SIGTERM, launcher)
        time.sleep(chance.random() * 0.01)


def stop_file(run: Run, chance: random.Random) -> None:
    (run.folder / "stop").touch()
    wait_until(lambda: run.ended, 60)


def stop_file_before_the_launch(run: Run, chance: random.Random) -> None:
    """An attempt that finds a request to stop obeys it before its first step."""
    run.kill_group()
    before = run.step
    (run.folder / "stop").touch()
    run.launch()
    if not wait_until(lambda: run.ended, 60) or run.state["state"] != "stopped" or run.step > before:
        run.wrong.append("a stop that was asked for before the launch was not obeyed")


def kill_the_launcher_before_ranks_join(run: Run, chance: random.Random) -> None:
    """No rank may outlive it: such a rank could join the next attempt."""
    run.kill_group()
    run.launch()
    wait_until(run.workers, 20)
    time.sleep(chance.random() * 2)
    ranks = [psutil.Process(pid) for pid in run.workers()]
    kill_the_launcher(run, chance)
    if not wait_until(lambda: not any(map(is_alive, ranks)), 30):
        run.wrong.append("a rank outlived its launcher")


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that has ended, and whose parent has not asked for its exit code, does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def suspend_all(run: Run, chance: random.Random) -> None:
    """As `scontrol suspend` or a laptop's lid do, for longer than a rank may stand still."""
    processes = run.processes()
    run.send(signal.SIGSTOP, processes)
    time.sleep(SUSPENDED_S)
    run.send(signal.SIGCONT, processes)


def fail_reads_of_the_newest_checkpoint(run: Run, chance: random.Random) -> None:
    """They fail some times while the next attempt starts, and then work."""
    run.kill_group()
    assert run.calls is not None
    if (newest := run.newest_checkpoint()) is not None:
        run.calls.fail("open", errno.EIO, f"{newest.name}/", chance.randrange(1, 4))
        run.launch()
        wait_until(lambda: run.calls is None or not run.calls.left() or run.ended, 60)
        if run.calls.left():
            run.wrong.append("the newest checkpoint was not read")
        run.calls.stop()


def forbid_the_newest_checkpoint(run: Run, chance: random.Random) -> None:
    """Permissions forbid to read it until the next attempt has resumed from another one, or refused to start."""
    run.kill_group()
    assert run.calls is not None
    if (newest := run.newest_checkpoint()) is not None:
        restarts = run.state["restarts"]
        run.calls.fail("open", errno.EACCES, f"{newest.name}/")
        run.launch()
        wait_until(lambda: run.state["restarts"] > restarts or run.ended, 60)
        run.calls.stop()


def fail_fsync_and_rename_in_a_save(run: Run, chance: random.Random) -> None:
    """Some flushes and some renames of the next save fail; each is tried again."""
    assert run.calls is not None
    run.calls.fail("fsync", errno.EIO, "/checkpoints", chance.randrange(1, 4))
    run.calls.fail("rename", errno.EIO, "/checkpoints/.step-", chance.randrange(1, 3))
    wait_until(lambda: run.calls is None or not run.calls.left() or run.ended, 60)
    run.calls.stop()


def fail_reads_for_seconds(run: Run, chance: random.Random) -> None:
    """The file server does not answer for the file `stop` and `state.json`, while the run trains."""
    assert run.calls is not None
    run.calls.fail("stat", errno.ESTALE, "/stop")
    run.calls.fail("open", errno.EIO, "/state.json")
    time.sleep(1 + 4 * chance.random())
    run.calls.stop()


def fail_reads_while_it_starts(run: Run, chance: random.Random) -> None:
    """The same while the next attempt starts."""
    run.kill_group()
    run.launch()
    fail_reads_for_seconds(run, chance)
    assert run.calls is not None
    run.calls.fail("open", errno.EIO, "/state.json")
    time.sleep(START_S)
    run.calls.stop()


def set_the_clock_back(run: Run, chance: random.Random) -> None:
    """By an hour, before the next attempt."""
    run.kill_group()
    run.clock_shift_s -= 3600


def change_the_ranks(run: Run, chance: random.Random) -> None:
    """A stop or a kill; the next attempt has another world size, ZeRO stage and micro-batch."""
    chance.choice((stop_file, kill_all))(run, chance)
    now = (run.world_size, run.stage, run.micro_batch)
    run.world_size, run.stage, run.micro_batch = chance.choice([world for world in WORLDS if world != now])


Fault = Callable[[Run, random.Random], None]

EXACT: dict[Fault, int] = {
    kill_a_rank: 5,
    kill_the_launcher: 4,
    kill_all: 2,
    kill_all_while_it_starts: 3,
    kill_all_in_a_save: 4,
    kill_all_in_a_validation: 3,
    damage_the_newest_checkpoint: 4,
    cut_a_shard: 3,
    fill_the_disk: 4,
    signals_in_bursts: 4,
    stop_file: 1,
    stop_file_before_the_launch: 1,
    kill_the_launcher_before_ranks_join: 2,
    suspend_all: 1,
    fail_reads_of_the_newest_checkpoint: 1,
    forbid_the_newest_checkpoint: 1,
    fail_fsync_and_rename_in_a_save: 2,
    fail_reads_for_seconds: 1,
    fail_reads_while_it_starts: 1,
    set_the_clock_back: 1,
}
"""The weight of each fault among all."""
NEED_CALLS: tuple[Fault, ...] = (
    fail_reads_of_the_newest_checkpoint,
    forbid_the_newest_checkpoint,
    fail_fsync_and_rename_in_a_save,
    fail_reads_for_seconds,
    fail_reads_while_it_starts,
    set_the_clock_back,
)
"""Faults that are injected by `failing_calls.py`."""
END_NO_ATTEMPT: tuple[Fault, ...] = (
    fill_the_disk,
    suspend_all,
    fail_fsync_and_rename_in_a_save,
    fail_reads_for_seconds,
)
"""Faults in which an attempt continues."""
ELASTIC_FAULTS: dict[Fault, int] = {change_the_ranks: 6, damage_the_newest_checkpoint: 1, kill_a_rank: 2}


@dataclass
class Tally:
    """The outcome of all faults of one kind."""

    injected: int = 0
    survived: int = 0
    lost: list[int] = field(default_factory=list)


def endure(run: Run, faults: list[Fault], chance: random.Random, deadline: float, tally: dict[str, Tally]) -> None:
    """Inject one fault after another into `run`, then let it finish."""
    for number, fault in enumerate(faults, start=1):
        target = run.step + chance.randrange(1, LONGEST_CALM)
        arrived = advance(run, lambda target=target: run.finished or run.step >= target)  # type: ignore[misc]
        if not arrived or run.finished or time.monotonic() > deadline:
            why = "no time is left" if time.monotonic() > deadline else "the run is finished, or makes no steps"
            print(f"  faults {number} to {len(faults)} are not injected: {why}", flush=True)
            break
        time.sleep(chance.random() * 0.2)
        name = fault.__name__.replace("_", " ")
        entry = tally.setdefault(name, Tally())
        entry.injected += 1
        step, resumed_from = inject(run, fault, chance)
        entry.survived += resumed_from is not None
        entry.lost.append(max(0, step - (resumed_from or 0)))
        outcome = "LOST" if resumed_from is None else f"resumed from step {min(step, resumed_from)}"
        print(f"  {number:3} of {len(faults)}: {name} at step {step}: {outcome}", flush=True)
    advance(run, lambda: run.finished and run.ended)


def inject(run: Run, fault: Fault, chance: random.Random) -> tuple[int, int | None]:
    """Inject a fault. Returns the last step before it, and the step that the run resumed from (None: no later step)."""
    restarts = run.state.get("restarts", 0)
    fault(run, chance)
    before = run.step
    resumed_from: list[int] = []

    def further() -> bool:
        state = run.state
        if not resumed_from and state.get("restarts", 0) > restarts:
            resumed_from.append(int(state["resumed_from"]))
        return run.finished or (run.step > before and (bool(resumed_from) or fault in END_NO_ATTEMPT))

    survived = advance(run, further)
    return before, (resumed_from[0] if resumed_from else before) if survived else None


def advance(run: Run, condition: Callable[[], bool]) -> bool:
    """Start attempts until `condition` is true. Returns False if the run makes no step for `STALL_S` before that."""
    deadline, latest = time.monotonic() + STALL_S, run.step
    while not condition():
        if run.step > latest:
            deadline, latest = time.monotonic() + STALL_S, run.step
        if time.monotonic() > deadline:
            return False
        run.keep_alive()
        time.sleep(0.01)
    return True


def train_undisturbed(run: Run) -> None:
    """Make all steps in one attempt."""
    run.launch()
    assert run.process is not None
    if run.process.wait() != 0:
        sys.exit(f"the undisturbed run failed:\n{run.said.read_text()[-4000:]}")


def compare(run: Run, whole: Run) -> tuple[bool, float]:
    """Whether all losses (with validation) are bitwise those of `whole`, and their largest relative difference.

    If a step is in the log twice or not at all, it is printed, and the difference is infinite.
    """
    ours, theirs = (
        [((line["step"], key), line[key]) for line in r.log() for key in ("loss", "valid_loss") if key in line]
        for r in (run, whole)
    )
    for (mine, _), (its, _) in zip_longest(ours, theirs, fillvalue=("nothing", 0.0)):
        if mine != its:
            print(f"the log has {mine}, the log of the undisturbed run has {its}")
            return False, float("inf")
    return ours == theirs, max(abs(a[1] - b[1]) / b[1] for a, b in zip(ours, theirs, strict=True))


def curve_is_whole(run: Run) -> bool:
    """Whether TensorBoard's own reader finds each logged loss once, in the order of steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curve = EventAccumulator(str(run.folder / "tensorboard"), {"scalars": 0}).Reload().Scalars("train/loss")
    logged = [(line["step"], line["loss"]) for line in run.log() if "loss" in line]
    shown = [(point.step, point.value) for point in curve]
    same = len(shown) == len(logged) and all(
        step == at and abs(loss - value) < 1e-5 * loss for (step, loss), (at, value) in zip(logged, shown, strict=True)
    )
    if not same:
        print(f"TensorBoard's curve has {len(shown)} points, the log has {len(logged)} losses, or they differ")
    return same


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mount a small disk on `folder`. Yields whether that was possible."""
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=False, capture_output=True
        ).returncode
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=False)


def drawn(kinds: dict[Fault, int], count: int, chance: random.Random) -> list[Fault]:
    """`count` faults in random order, about in the proportions of `kinds`, every kind at least once."""
    pool = [fault for fault, times in kinds.items() for _ in range(times)]
    faults = [*kinds, *(pool[i % len(pool)] for i in chance.sample(range(len(pool)), len(pool)))][:count]
    faults += chance.choices(pool, k=count - len(faults))
    chance.shuffle(faults)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=44, help="number of faults in both campaigns (default 44)")
    parser.add_argument("--minutes", type=float, default=15, help="no fault is injected in the last tenth of this time")
    parser.add_argument("--seed", type=int, default=0, help="decides which faults are injected, and when")
    given = parser.parse_args()
    chance, started = random.Random(given.seed), time.monotonic()
    deadline = started + given.minutes * 60 * 0.9
    tally: dict[str, Tally] = {}
    verdicts = []
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name) / "disk") as has_disk:
        folder = Path(name)
        dataset = make_dataset(folder / "dataset")
        if not has_disk:
            del EXACT[fill_the_disk]
            print("cannot mount a small disk (not root): the fault 'fill the disk' is left out")
        calls = None
        try:
            calls = FailingCalls(compile_shim(folder), folder / "failing-calls")
        except NoCompiler as error:
            for fault in NEED_CALLS:
                del EXACT[fault]
            print(f"{error}: failing calls and the clock are left out")
        elastic_count = given.faults // 4
        for campaign, kinds, count, dropout in (
            ("elastic", ELASTIC_FAULTS, elastic_count, 0.0),
            ("exact", EXACT, given.faults - elastic_count, 0.1),
        ):
            steps = (count + 2) * STEPS_A_FAULT
            place = folder / "disk" if campaign == "exact" else folder
            run = Run(place / campaign, dataset, steps, dropout, folder / f"{campaign}.said", calls=calls)
            whole = Run(folder / f"whole-{campaign}", dataset, steps, dropout, folder / f"whole-{campaign}.said")
            whole.world_size = 1 if campaign == "elastic" else run.world_size
            print(f"{campaign}: {steps} steps, {count} faults", flush=True)
            try:
                train_undisturbed(whole)
                endure(run, drawn(kinds, count, chance), chance, deadline, tally)
            finally:
                for either in (whole, run):
                    either.kill_group()
            same, worst = compare(run, whole)
            good = run.finished and (same if campaign == "exact" else worst <= ELASTIC)
            good = curve_is_whole(run) and good and not run.wrong
            for line in run.wrong:
                print(f"WRONG: {line}")
            verdicts.append((campaign, good, same, worst))
            if not good:
                print(run.said.read_text()[-4000:])
    print(f"\n{'fault':40}{'injected':>10}{'survived':>10}{'steps lost, each':>24}")
    for fault, entry in tally.items():
        lost = f"{min(entry.lost)} to {max(entry.lost)}, mean {sum(entry.lost) / len(entry.lost):.1f}"
        print(f"{fault:40}{entry.injected:>10}{entry.survived:>10}{lost:>24}")
    injected, survived = (sum(getattr(e, k) for e in tally.values()) for k in ("injected", "survived"))
    print(f"{'all':40}{injected:>10}{survived:>10}")
    for campaign, good, same, worst in verdicts:
        print(f"{campaign}: losses {'bitwise equal' if same else f'differ by {worst:.1e} relative'} "
              f"to those of the undisturbed run: {'as promised' if good else 'NOT AS PROMISED'}")  # fmt: skip
    print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    enough = injected >= min(given.faults, ENOUGH)
    sys.exit(0 if enough and survived == injected and all(good for _, good, _, _ in verdicts) else 1)


if __name__ == "__main__":
    main()
