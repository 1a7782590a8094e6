"""Plots of a report, with matplotlib where it is installed (the extra `bench`)."""

from importlib.util import find_spec
from pathlib import Path

from ktransformers.server.bench.report import OURS, Report, middle


def draw(report: Report, folder: Path) -> list[Path]:
    """Write PNG files of what the report has; none without matplotlib. OSError."""
    if find_spec("matplotlib") is None:
        return []
    written = []
    if report.rows:
        written.append(_rates(report, folder / "engine.png"))
    if report.serving:
        written.append(_serving(report, folder / "serving.png"))
    return written


def _title(report: Report) -> str:
    return f"{Path(report.model).name}\n{report.cpu}, {report.limits.threads} threads, {report.limits.isa}"


def _rates(report: Report, path: Path) -> Path:
    """Bars of tokens per second by load and side, and the bound as a line; logarithmic."""
    from matplotlib.figure import Figure

    sides = list(dict.fromkeys(side for row in report.rows for side in row.rates))
    figure = Figure(figsize=(1.6 * len(report.rows) + 2, 5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(sides)
    for s, side in enumerate(sides):
        heights = [middle(row.rates.get(side, [])) or 0.0 for row in report.rows]
        places = [i + (s - (len(sides) - 1) / 2) * width for i in range(len(report.rows))]
        bars = axes.bar(places, heights, width, label=side)
        axes.bar_label(bars, fmt="{:.0f}", fontsize=7)
    at = range(len(report.rows))
    bounds = [middle(row.bounds) or 0.0 for row in report.rows]
    axes.hlines(bounds, [i - 0.45 for i in at], [i + 0.45 for i in at], colors="black", label="bound")
    axes.set_yscale("log")
    axes.set_ylabel("tokens/s")
    axes.set_xticks(range(len(report.rows)), [row.name for row in report.rows], rotation=20)
    axes.set_title(_title(report), fontsize=9)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _serving(report: Report, path: Path) -> Path:
    """Output tokens per second and the median time to the first token, by the number of clients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    rates, firsts = figure.subplots(1, 2)
    clients = [serving.traffic.clients for serving in report.serving]
    for side in dict.fromkeys(side for serving in report.serving for side in serving.rounds):
        rounds = [serving.rounds.get(side, []) for serving in report.serving]
        rates.plot(clients, [middle([m.tokens_per_second for m in r]) for r in rounds], "o-", label=side)
        firsts.plot(clients, [middle([m.first_p50 for m in r]) for r in rounds], "o-", label=side)
    if any(serving.alone for serving in report.serving):
        alone = [middle(serving.alone) for serving in report.serving]
        rates.plot(clients, alone, "k--", label=f"{OURS}, engine alone")
    rates.set_ylabel("output tokens/s")
    firsts.set_ylabel("s to the first token (median)")
    for axes in (rates, firsts):
        axes.set_xlabel("clients")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.suptitle(_title(report), fontsize=9)
    figure.savefig(path, dpi=120)
    return path
