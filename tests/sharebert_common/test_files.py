"""Folders that are whole or absent: what a power cut, a kill and a full disk leave."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sharebert_common.errors import BadInput
from sharebert_common.files import make_folders, whole_or_absent_folder

ROOT = Path(__file__).parents[2]


def write(out: Path, text: str = "new") -> None:
    with whole_or_absent_folder(out) as folder:
        (folder / "part").mkdir()
        (folder / "a.txt").write_text(text)
        (folder / "part" / "b.txt").write_text(text)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every flush, move and deletion, in order: (what, name of the file or folder)."""
    found: list[tuple[str, str]] = []

    def recorded(module: Any, name: str, of: Callable[[Any], Any]) -> None:
        real = getattr(module, name)

        def call(*given: Any, **named: Any) -> Any:
            found.append((name, Path(of(given[0])).name))
            return real(*given, **named)

        monkeypatch.setattr(module, name, call)

    recorded(os, "fsync", lambda opened: Path(f"/proc/self/fd/{opened}").readlink())
    recorded(Path, "replace", lambda path: path)
    recorded(shutil, "rmtree", lambda path: path)
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_the_old_folder_goes_after_the_new_one_is_on_the_disk(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    out = tmp_path / "parent" / "out"
    write(out, "old")
    flushed = [name for what, name in calls if what == "fsync"]
    assert flushed[0] == tmp_path.name, "the name of the new parent"
    assert flushed[-1] == "parent", "the name of the new folder"
    calls.clear()
    write(out)
    temporary = flushed[-2]
    assert temporary.startswith(".out.")
    new, moved_out, moved_in, parent, deleted = calls[-5:]
    assert {name for what, name in calls[:-4] if what == "fsync"} == {"a.txt", "b.txt", "part", new[1]}
    assert new[0] == "fsync"
    assert new[1].startswith(".out.")
    assert moved_out == ("replace", "out")
    assert moved_in == ("replace", new[1])
    assert parent == ("fsync", "parent")
    assert deleted == ("rmtree", f"{new[1]}.old")
    assert (out / "a.txt").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")

    def stop() -> None:
        with whole_or_absent_folder(tmp_path / "out") as folder:
            (folder / "a.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert (tmp_path / "out" / "part" / "b.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_and_the_folder_that_it_names_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real" / "a.txt").read_text() == "new"
    assert sorted(path.name for path in tmp_path.glob("**/*")) == ["a.txt", "b.txt", "disk", "link", "part", "real"]


def test_a_move_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out", "old")
    real = Path.replace

    def replace(source: Path, target: Path) -> Path:
        if target == tmp_path / "out" and not source.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return real(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "out")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import sys
from pathlib import Path
from sharebert_common import files

def stay(*_):
    print("here", flush=True)
    sys.stdin.read()

if sys.argv[2] == "between":
    real, moves = Path.replace, []
    def replace(source, target):
        real(source, target)
        moves.append(target)
        if len(moves) == 1:
            stay()
    Path.replace = replace
with files.whole_or_absent_folder(Path(sys.argv[1])) as folder:
    (folder / "a.txt").write_text("of the killed writer")
    if sys.argv[2] == "during":
        stay()
"""


@pytest.mark.parametrize("when", ["during", "between"])
def test_leftovers_of_a_killed_writer_are_removed_and_those_of_a_living_one_are_not(tmp_path: Path, when: str) -> None:
    """`between` the two moves there is no folder in place: the next writer puts the old one back first."""
    out = tmp_path / "out"
    write(out, "old")
    command = [sys.executable, "-c", KILLED, str(out), when]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "here\n"
        left = {path.name for path in tmp_path.iterdir()} - {"out"}
        assert len(left) == (1 if when == "during" else 2)
        write(tmp_path / "other")
        if when == "during":
            write(out, "of another writer")
            assert left < {path.name for path in tmp_path.iterdir()}, "the writer is alive"
        os.kill(writer.pid, signal.SIGKILL)
    assert out.exists() == (when == "during")

    def look_and_stop() -> str:
        with whole_or_absent_folder(out):
            raise KeyboardInterrupt((out / "a.txt").read_text())

    with pytest.raises(KeyboardInterrupt, match="of another writer" if when == "during" else "old"):
        look_and_stop()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


def test_folders_of_other_names_and_other_hosts_stay(tmp_path: Path) -> None:
    for name in (".out.another-host.0123abcd", ".out2.x.0123abcd", ".outline"):
        (tmp_path / name).mkdir()
    write(tmp_path / "out")
    assert len(list(tmp_path.iterdir())) == 4


def test_an_old_folder_that_another_host_moved_aside_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "out", "old")
    aside = tmp_path / ".out.another-host.0123abcd.old"
    (tmp_path / "out").rename(aside)

    def stop_in_a_write() -> None:
        with whole_or_absent_folder(tmp_path / "out"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_in_a_write()
    assert aside.exists(), "that host may be between its two moves"
    monkeypatch.setattr("sharebert_common.files._DEAD_S", -1.0)
    with pytest.raises(KeyboardInterrupt):
        stop_in_a_write()
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert not aside.exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"file/out: cannot be made \(File exists: .*file\)"):
        write(tmp_path / "file" / "out")


@pytest.mark.parametrize("name", ["file", "file/out", "file/a/b"])
def test_a_folder_below_a_file_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match=f"{tmp_path / name}: cannot be made \\(.*choose another folder$") as raised:
        make_folders(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_folder_where_there_can_be_none_is_one_line() -> None:
    with pytest.raises(BadInput, match=r"/proc/out/here: cannot be made \(No such file or directory: /proc"):
        make_folders(Path("/proc/out/here"))


def test_folders_are_made_once_and_may_be_there(tmp_path: Path) -> None:
    for _ in range(2):
        make_folders(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
