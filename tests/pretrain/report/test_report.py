"""The report of a run that was written by hand: its numbers, its tables, and that it needs no network."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

import sharebert_cli
from pretrain.report.report import page, report, summary
from pretrain.report.run_data import read_run
from pretrain.run.folder import RunFolder
from pretrain.run.look import Look
from pretrain.run.metric_log import MetricLog
from sharebert_common.errors import BAD_INPUT, BadInput


def make_run(folder: Path, lr: float, loss: float) -> Path:
    """Two attempts of 10 steps of 2 s each. The first attempt started at 1000 s."""
    folder.mkdir()
    (folder / "config.yaml").write_text(f"steps: 20\noptimizer:\n  lr: {lr}\n")
    attempt = {"ranks": 4, "hosts": ["n1", "n1", "n2", "n2"], "packages": {"torch": "2"}, "cpu": {"name": "<cpu>"}}
    (folder / "environment.json").write_text(json.dumps([attempt | {"time": time} for time in (1000.0, 1100.0)]))
    (folder / "state.json").write_text(
        json.dumps({"state": "stopped", "reason": "time & tide", "step": 20, "steps": 40})
    )
    lines = [
        {"step": 0, "valid_loss": 9.0, "valid_accuracy": 0.0, "time": 1010.0},
        {"step": 10, "loss": 5.0, "lr": lr, "step_s": 2.0, "tokens": 100, "tokens_per_s": 5.0, "time": 1040.0},
        {"step": 20, "loss": loss, "lr": lr, "step_s": 2.0, "tokens": 200, "tokens_per_s": 5.0, "time": 1160.0},
        {"step": 20, "valid_loss": loss + 0.5, "valid_accuracy": 0.25, "time": 1180.0},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [{"time": 0.0, "step": 0, "text": "started"}, {"time": 86400.0, "step": 10, "text": "<resumed>"}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    log = MetricLog(RunFolder(folder), enabled=True, steps=40)
    log.open(0, "steps: 20\n")
    for step in (0, 10, 20):
        table = f"| sentence | likeliest words |\n|---|---|\n| a [MASK] | at{step} 0.50, b\\|c 0.10 |"
        log.look(Look(step=step, texts={"samples/fill_mask": table}))
    log.close()
    return folder


def test_numbers_by_hand(tmp_path: Path) -> None:
    found = summary(read_run(make_run(tmp_path / "a", 1e-3, 4.0)))
    assert found["goodput"] == f"{40 / 180:.1%}"
    assert found["device-hours of steps"] == f"{40 * 4 / 3600:.2f} (4 ranks)"
    assert (found["validation loss, last"], found["validation loss, lowest"]) == ("4.5000", "4.5000")
    assert (found["state"], found["steps"]) == ("stopped: time & tide", "20 of 40")
    assert (found["attempts"], found["share of the peak"]) == ("2", "-")


class Page(HTMLParser):
    """The text of a page, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.loaded, self.open = "", [], []

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value for key, value in attrs if key in ("src", "href", "xlink:href") and value]
        assert tag not in ("script", "link", "img")


def test_the_page_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = make_run(tmp_path / "a", 1e-3, 4.0), tmp_path / "new" / "r.html"
    assert sharebert_cli.main(["report", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text()
    page = Page()
    page.feed(text)
    assert all(target.startswith("#") for target in page.loaded), "it needs no network"
    for said in (
        "time & tide",
        "<resumed>",
        "1970-01-02 00:00:00",
        "at20 0.50, b|c 0.10",
        "<cpu>",
        "optimizer.lr",
        "n1, n2",
    ):
        assert said in page.text
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(svgs) == 6
    for svg in svgs:
        ElementTree.fromstring(svg)


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, lr, loss) for name, lr, loss in (("a", 1e-3, 4.0), ("b", 2e-3, 3.0))]
    out = report(runs, tmp_path / "r.md")
    text = out.read_text()
    assert "| validation loss, last | 4.5000 | 3.5000 |" in text
    different, rest = text.split("## Keys that differ")[1].split("## Events of", 1)
    assert "| optimizer.lr | 0.001 | 0.002 |" in different
    assert "| steps |" not in different
    assert "| steps | 20 | 20 |" in rest.split("## Recipe")[1]
    for name in re.findall(r"!\[curve\]\((.*?)\)", text):
        ElementTree.parse(tmp_path / name)
    assert len(page([read_run(run) for run in runs])) > 8


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sharebert_cli.main(["report", str(tmp_path)]) == BAD_INPUT
    assert f"{tmp_path}: no run with a log is there" in capsys.readouterr().err
    with pytest.raises(BadInput, match=r"--out: .*r\.pdf: name an \.html or \.md file"):
        report([tmp_path], tmp_path / "r.pdf")
