"""The plots of a report, drawn by Matplotlib as SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence

from pretrain.report.run_data import RunData
from sharebert_common.errors import BadInput

PLOTS = {
    "loss (thin: training, thick: validation)": ("loss", "valid_loss"),
    "masked accuracy": ("accuracy", "valid_accuracy"),
    "learning rate": ("lr",),
    "gradient norm": ("grad_norm",),
    "tokens a second": ("tokens_per_s",),
    "goodput": ("goodput",),
}
"""Title of each plot, and the keys of the log that it shows."""


def curves(runs: Sequence[RunData]) -> list[str]:
    """Each plot as an SVG element, a colour for each run. Raises BadInput where Matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BadInput("sharebert report: needs Matplotlib, pip install 'sharebert[report]'") from error

    drawn = []
    for title, keys in PLOTS.items():
        figure = Figure(figsize=(5.5, 3.2), layout="constrained")
        axes = figure.subplots()
        for number, run in enumerate(runs):
            for key in keys:
                if points := run.points(key):
                    wide = key.startswith("valid_") or len(keys) == 1
                    axes.plot(
                        *zip(*points, strict=True),
                        color=f"C{number}",
                        linewidth=1.8 if wide else 0.8,
                        marker="o" if key.startswith("valid_") else None,
                        markersize=3,
                        label=run.name if key == keys[-1] else None,
                    )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if len(runs) > 1 and axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        drawn.append(out.getvalue()[out.getvalue().index("<svg") :])
    return drawn
