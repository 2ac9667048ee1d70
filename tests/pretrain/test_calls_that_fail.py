"""Calls that fail below Python: in a save, at the start of a run, while it trains, and in an export."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from power_cuts import python, states_after_power_cuts

from benchmarks.failing_calls import FailingCalls


@pytest.fixture
def calls(shim: Path, tmp_path: Path) -> FailingCalls:
    return FailingCalls(shim, tmp_path / "rules")


IN_ONE_PROCESS = """
import json, os, sys
from pathlib import Path
from benchmarks.failing_calls import FailingCalls
from pretrain.checkpoint.format import newest_whole
from sharebert_common.errors import BadInput
from test_checkpoint import write

calls = FailingCalls(Path(), Path(os.environ["FAILING_CALLS"]))

def saved(folder, step):
    said = []
    write(folder, step, world_size=2, said=said)
    return said

def found(folder):
    said = []
    try:
        return [f"took {newest_whole(folder, said.append).step}"]
    except BadInput as error:
        return [f"refused {error}"]

results = []
for number, (call, error, part, times) in enumerate(json.loads(sys.argv[2])):
    folder = Path(sys.argv[1]) / str(number) / "checkpoints"
    if sys.argv[3] == "read":
        saved(folder, 10), saved(folder, 20)
    calls.fail(call, error, part, times)
    said = found(folder) if sys.argv[3] == "read" else saved(folder, 10)
    left = calls.left()
    calls.stop()
    results.append([said, left, found(folder)])
print(json.dumps(results))
"""
"""Starting Python with torch takes longer than all cases."""


def results_of(calls: FailingCalls, folder: Path, cases: list[tuple[str, int, str, int]], what: str) -> list[Any]:
    return list(json.loads(python(IN_ONE_PROCESS, str(folder), json.dumps(cases), what, **calls.environment)))


def test_checkpoints_that_cannot_be_read(tmp_path: Path, calls: FailingCalls) -> None:
    cases = {
        ("open", errno.EIO, "step-00000020/manifest.json", 2): "took 20",
        ("read", errno.ESTALE, "step-00000020/rank-00001", 1): "took 20",
        ("stat", errno.EIO, "step-00000020/rank-00000", 1): "took 20",
        ("open", errno.EACCES, "step-00000020/rank-00001", 999): "took 10",
        ("open", errno.EACCES, "/step-", 999): "refused",
        ("listdir", errno.EACCES, "/checkpoints", 999): "cannot be listed now (Permission denied)",
    }
    results = results_of(calls, tmp_path, [*cases], "read")
    for case, printed, (said, left, later) in zip(cases, cases.values(), results, strict=True):
        assert printed in " ".join(said), case
        assert case[-1] == 999 or left == 0, case
        assert later == ["took 20"], case


def test_a_save_tries_again(tmp_path: Path, calls: FailingCalls) -> None:
    paths = [
        ("mkdir", "/.step-00000010"),
        ("open", "/.step-00000010"),
        ("fsync", "/rank-00001.safetensors"),
        ("fsync", "/checkpoints"),
        ("rename", "/.step-00000010"),
        ("unlink", "written.json"),
        ("read", "written.json"),
    ]
    cases = [(call, errno.EIO, part, 2) for call, part in paths]
    for case, (said, left, later) in zip(cases, results_of(calls, tmp_path, cases, "save"), strict=True):
        assert "it is tried again in" in " ".join(said), case
        assert left == 0, case
        assert later == ["took 10"], case


RUN = """
import sys
from pathlib import Path
from pretrain.faults.stop import StopRequest
from pretrain.run.folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.occupy()
stop = StopRequest()
stop.watch(run.stop_file)
run.start(step=3, steps=9, tokenizer=Path(sys.argv[2]), recipe_yaml="", environment={})
print(stop.asked)
run.stop_file.touch()
print([stop.asked for _ in range(3)])
run.end("stopped", step=4)
"""


def test_reads_that_fail_for_a_moment_end_no_run(tmp_path: Path, calls: FailingCalls) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    calls.fail("open", errno.EIO, "/state.json", 3)
    calls.fail("stat", errno.ESTALE, "/run/stop", 3)
    printed = python(RUN, str(tmp_path / "run"), str(tmp_path / "tokenizer.json"), **calls.environment)
    assert printed.split("\n")[1].endswith("True]")
    assert calls.left() == 0
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["state"], state["step"], state["steps"]) == ("stopped", 4, 9)


EXPORT = """
import sys
from pathlib import Path
from sharebert_common.errors import BadInput
from sharebert_common.files import whole_or_absent_folder
try:
    with whole_or_absent_folder(Path(sys.argv[1])) as folder:
        (folder / "weights").write_text(sys.argv[2])
except (BadInput, OSError) as error:
    print(error)
"""


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize(
    ("call", "part"), [("fsync", "/weights"), ("fsync", "/.out."), ("rename", "/.out."), ("open", "/weights")]
)
def test_an_export_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, calls: FailingCalls, call: str, part: str, number: int
) -> None:
    out = tmp_path / "out"
    python(EXPORT, str(out), "old")
    calls.fail(call, number, part, 1)
    assert os.strerror(number) in python(EXPORT, str(out), "new", **calls.environment)
    assert calls.left() == 0
    assert (out / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


LOG = """
import sys
from pathlib import Path
from test_checkpoint import SHAPES, fragments_of
from tiny_runs import open_writer
from sharebert_common.run_files import LogWriter
root = Path(sys.argv[1])
log = LogWriter(root / "log.jsonl")
writer = open_writer(root / "checkpoints", 0, 1, print)
writer.sync_log = log.sync
for step in (1, 2, 3, 4):
    log.waiting.append({"step": step})
    log.write()
    if step % 2 == 0:
        writer.save(step, fragments_of(0, 1), SHAPES, {}, {})
        writer.finish()
"""


def test_the_log_is_on_the_disk_when_its_checkpoint_is(shim: Path, tmp_path: Path) -> None:
    for state, call, _ in states_after_power_cuts(shim, tmp_path, LOG):
        saved = [int(path.name[5:]) for path in state.glob("checkpoints/step-*")]
        logged = (state / "log.jsonl").read_text().splitlines() if (state / "log.jsonl").exists() else []
        assert len(logged) >= max(saved, default=0), call
