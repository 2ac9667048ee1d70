"""TensorBoard on a run that was stopped and resumed: its own reader finds every tag, and a browser shows the pages."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import train_arguments

import sharebert_cli
from pretrain.run.event_file import LAYOUT
from sharebert_common.errors import FINISHED, STOPPED

NOT_IN_THIS_RUN = {"speed/mfu", "health/slowest_rank_factor", "health/loss_deviations"}
"""Tags that a short run on one CPU does not have."""


DRAWN_BYTES = 40_000
"""A screenshot with content is larger: those that were looked at had 65 to 146 kB."""


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first step and then went on to the end."""
    run = tmp_path_factory.mktemp("dashboard") / "run"
    keys = {"monitor.every": 2, "validate.every": 4, "validate.rows": 8, "steps": 8, "monitor.profile": "[3]"}
    words = [*train_arguments(dataset, run), *(f"{key}={value}" for key, value in keys.items())]
    run.mkdir()
    (run / "stop").touch()
    codes = []
    for _ in range(2):
        command = [sys.executable, "-m", "sharebert_cli", "train", "demo", *words]
        codes.append(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode)
    assert codes == [STOPPED, FINISHED]
    return run


@pytest.mark.slow
def test_every_tag_is_there_and_each_step_once(run: Path) -> None:
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    board.Reload()
    shown = {tag for charts in LAYOUT.values() for _, tags in charts.values() for tag in tags}
    assert shown - set(board.Tags()["scalars"]) <= NOT_IN_THIS_RUN
    assert [point.step for point in board.Scalars("train/loss")] == [2, 4, 6, 8]
    assert [point.step for point in board.Scalars("valid/loss")] == [0, 4, 8]
    assert [image.step for image in board.Images("weights/singular_values")] == [0, 4, 8]
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors("events/text_summary")]
    assert texts == ["started", "stopped: file 'stop'", "resumed from step 1", "finished"]
    assert (run / "profiles" / "step-00000003.json.gz").stat().st_size > 1000


@pytest.mark.slow
def test_a_browser_shows_the_pages(run: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(run), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        address = f"http://127.0.0.1:{port}/"
        for _ in range(120):
            try:
                urllib.request.urlopen(address, timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        for page in ("scalars", "custom_scalars", "images", "text", "hparams"):
            picture = tmp_path / f"{page}.png"
            browse(chromium, f"{address}#{page}", picture)
            assert picture.stat().st_size > DRAWN_BYTES
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_the_report(run: Path, tmp_path: Path, width: int) -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    assert sharebert_cli.main(["report", str(run), "--out", str(page)]) == FINISHED
    browse(chromium, page.as_uri(), picture, width)
    assert picture.stat().st_size > DRAWN_BYTES
    # A frame of this width: Chromium has windows of 500 and more. The page must not be wider than it.
    frame = tmp_path / "frame.html"
    script = "onload = () => document.title = frames[0].document.documentElement.scrollWidth"
    frame.write_text(f'<iframe src="report.html" width="{width}" height="900"></iframe><script>{script}</script>')
    options = [*CHROMIUM, "--allow-file-access-from-files", "--dump-dom", frame.as_uri()]
    shown = subprocess.run([chromium, *options], check=True, capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>(\d+)</title>", shown)
    assert title is not None
    assert int(title[1]) <= width


CHROMIUM = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]


def browse(chromium: str, address: str, picture: Path, width: int = 1300) -> None:
    """Take a screenshot of a page."""
    options = [*CHROMIUM, f"--window-size={width},1000", f"--screenshot={picture}"]
    subprocess.run([chromium, *options, address], check=True, capture_output=True, timeout=120)
