"""Power cuts at every moment: nothing that was said to be durable is lost. The trace of real calls is replayed."""

from __future__ import annotations

import json
from pathlib import Path

from made_texts import recipe, tree, write_jsonl
from power_cuts import states_after_power_cuts

from benchmarks.failing_calls import CrashStates, File, Folder, write_tree
from data_prep.pipeline import prepare
from pretrain.checkpoint.format import newest_whole

SAVES = """
import sys
from pathlib import Path
from test_checkpoint import write
root = Path(sys.argv[1])
for step in (10, 20, 30, 40):
    write(root / "checkpoints", step, world_size=2, keep=2)
    (root / f"done-{step}").mkdir()
"""


def test_a_checkpoint_that_was_saved_is_there_after_a_power_cut(shim: Path, tmp_path: Path) -> None:
    states = 0
    for state, call, names in states_after_power_cuts(shim, tmp_path, SAVES):
        saved = max([int(name[5:]) for name in names if name.startswith("done-")], default=0)
        found = newest_whole(state / "checkpoints", [].append, or_none=True)
        assert (found.step if found else 0) >= saved, call
        states += 1
    assert states > 100


EXPORTS = """
import json, sys
from pathlib import Path
from made_tasks import tiny_export
from made_texts import tree
root = Path(sys.argv[1])
for number in range(2):
    print(json.dumps(tree(tiny_export(root / "out", hidden_dropout_prob=number / 10))))
    (root / f"done-{number}").mkdir()
"""


def test_an_export_is_whole_and_the_old_one_goes_last(shim: Path, tmp_path: Path) -> None:
    for state, call, names in states_after_power_cuts(shim, tmp_path, EXPORTS):
        whole = [json.loads(line) for line in (tmp_path / "printed").read_text().splitlines()]
        done = sum(name.startswith("done-") for name in names)
        # Between the two moves the old one has another name; the next export puts it back.
        places = [state / "out"] if (state / "out").exists() else sorted(state.glob(".out.*.old"))
        found = [tree(place) for place in places]
        assert all(one in whole for one in found), call
        assert done == 0 or whole.index(found[0]) >= done - 1, call


PREP = """
import sys
from pathlib import Path
from made_texts import recipe
from data_prep.pipeline import prepare
root = Path(sys.argv[1])
prepare(recipe(root / "out", root.parent / "corpus.jsonl"))
(root / "done").mkdir()
"""


def test_a_dataset_is_whole_and_prep_continues_after_a_power_cut(shim: Path, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [f"a text of some words, number {i}" for i in range(300)])
    whole = tree(prepare(recipe(tmp_path / "alone", corpus)))
    for number, (state, call, names) in enumerate(states_after_power_cuts(shim, tmp_path, PREP)):
        out = state / "out"
        if (out / "manifest.json").exists() or "done" in names:
            assert {name: data for name, data in tree(out).items() if not name.startswith(".work")} == whole, call
        elif number % 40 == 0:
            assert tree(prepare(recipe(out, corpus))) == whole, call


def test_the_model_of_a_disk(tmp_path: Path) -> None:
    """By hand: a name is sure after its folder's flush, bytes are sure after their file's."""
    trace, root = tmp_path / "trace", Path("/r")
    trace.mkdir()
    (trace / "0").write_bytes(b"flushed")
    calls = ["create /r/a", "sync /r/a 0", "create /r/b", "sync /r", "rename /r/a /r/b", "mkdir /r/d", "unlink /r/b"]
    (trace / "log").write_text("".join("\t".join([*call.split(), ""][:3]) + "\n" for call in calls))
    found: list[list[dict[str, bytes]]] = []
    for _, disk, least in CrashStates(Folder({"old": File(b"old")}, {"old": File(b"old")}), trace, root):
        state = tmp_path / f"state-{len(found)}-{least}"
        write_tree(disk, state, least)
        content = {path.name: path.read_bytes() if path.is_file() else b"/" for path in state.iterdir()}
        found = [*found, [content]] if least else [*found[:-1], [*found[-1], content]]
    old = {"old": b"old"}
    both = old | {"a": b"flushed", "b": b""}
    moved = old | {"b": b"flushed"}
    assert found == [
        [old, old | {"a": b""}],
        [old, old | {"a": b"flushed"}],
        [old, both],
        [both, both],
        [both, moved],
        [both, moved | {"d": b"/"}],
        [both, old | {"d": b"/"}],
    ]
