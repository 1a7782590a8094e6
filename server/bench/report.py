"""What a benchmark has found: as tables in the terminal, as JSON, as plots."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from rich.markup import escape
from rich.table import Table

from ktransformers.engine.bench.bounds import Profile, Spent
from ktransformers.engine.limits import Limits
from ktransformers.server.bench.serving import Footprint, Serving


@dataclass
class Row:
    """One load, measured in rounds: each side once in each round."""

    name: str
    rates: dict[str, list[float | None]] = field(default_factory=dict)
    """Tokens per second of each side in each round; ours is the side "ktransformers"."""
    limits: list[Limits] = field(default_factory=list)
    """Of the machine in each round, taken just before ours: they drift within minutes on a shared host."""
    bounds: list[float] = field(default_factory=list)
    """Tokens per second that those would allow."""


@dataclass
class Report:
    """Everything of one run."""

    cpu: str
    model: str
    limits: Limits
    """When the run began."""
    load_average: float
    """Of the machine when the run began: what else it was doing."""
    rows: list[Row] = field(default_factory=list)
    serving: list[Serving] = field(default_factory=list)
    footprint: Footprint | None = None
    profiles: list[Profile] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON. OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))


OURS = "ktransformers"


def cpu_name() -> str:
    """As the kernel calls it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def headline(report: Report) -> str:
    """What was measured where, in three lines."""
    limits = report.limits
    reads = ", ".join(f"{rate / 1e9:.1f} ({count})" for count, rate in limits.reads.items())
    peaks = ", ".join(f"{rate / 1e9:.0f} {dot}" for dot, rate in limits.peaks.items() if rate)
    return (
        f"{report.cpu}, {limits.threads} threads, table {limits.isa}, "
        f"load average {report.load_average:.1f}\n"
        f"reads {reads} GB/s (threads); computes {peaks} GOP/s\n"
        f"{report.model}"
    )


def rows_table(rows: Sequence[Row]) -> Table:
    """Everything as min/median/max; shares of the bound and ratios are medians of those of the rounds."""
    peers = list(dict.fromkeys(side for row in rows for side in row.rates if side != OURS))
    table = Table("tokens/s", box=None, pad_edge=False)
    columns = [OURS, "read GB/s", "bound", "of it", *(column for peer in peers for column in (peer, "ratio"))]
    for name in columns:
        table.add_column(escape(name), justify="right")
    for row in rows:
        ours = [rate for rate in row.rates[OURS] if rate is not None]
        reads = [limits.bandwidth / 1e9 for limits in row.limits]
        share = ratio(row.rates[OURS], row.bounds)
        cells = [row.name, _spread(ours), _spread(reads), _spread(row.bounds)]
        cells.append("" if share is None else f"{share:.0%}")
        for peer in peers:
            rates = row.rates.get(peer, [])
            cells += [_spread([rate for rate in rates if rate is not None]), _ratio(row.rates[OURS], rates)]
        table.add_row(*cells)
    return table


def serving_table(servings: Sequence[Serving]) -> Table:
    """Output tokens per second as min/median/max; times as medians over the rounds."""
    table = Table("clients", "server", box=None, pad_edge=False)
    for name in ("output tokens/s", "ratio", "TTFT p50/p95 ms", "between p50/p95 ms", "of the engine alone"):
        table.add_column(name, justify="right")
    for serving in servings:
        ours = [m.tokens_per_second for m in serving.rounds.get(OURS, [])]
        for side, rounds in serving.rounds.items():
            rates = [m.tokens_per_second for m in rounds]
            times = [
                "/".join(f"{1e3 * (middle(values) or 0):.0f}" for values in pair)
                for pair in (
                    ([m.first_p50 for m in rounds], [m.first_p95 for m in rounds]),
                    ([m.between_p50 for m in rounds], [m.between_p95 for m in rounds]),
                )
            ]
            against = "" if side == OURS else _ratio(ours, rates)
            alone = ratio(ours, serving.alone) if side == OURS else None
            share = "" if alone is None else f"{alone:.0%} of {_spread(serving.alone)}"
            table.add_row(str(serving.traffic.clients), escape(side), _spread(rates), against, *times, share)
    return table


def process_lines(report: Report) -> list[str]:
    """CPU time and memory of our processes, and how soon they answer."""
    lines = []
    for serving in report.serving:
        spent = [f"{role} {middle(values):.3f}" for role, values in serving.cpu.items()]
        if spent:
            lines.append(f"CPU s for 1,000 tokens, {serving.traffic.clients} clients: {', '.join(spent)}")
    if report.footprint is not None:
        peaks = {role: size / 1e6 for role, size in report.footprint.peak_bytes.items()}
        lines.append(
            f"start to first token {report.footprint.first_token:.2f} s; "
            f"idle {report.footprint.idle_cpu:.1%} of a CPU; peak memory {sum(peaks.values()):.0f} MB ("
            + ", ".join(f"{role} {size:.0f}" for role, size in peaks.items())
            + ")"
        )
    return lines


def middle(values: Sequence[float | None]) -> float | None:
    """The median of those that there are."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
    """The median over the rounds of each round's ratio: whatever disturbs a round falls on both."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=False) if a and b]
    return statistics.median(ratios) if ratios else None


def _ratio(ours: Sequence[float | None], theirs: Sequence[float | None]) -> str:
    value = ratio(ours, theirs)
    return "" if value is None else f"{value:.2f}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    digits = 1 if min(values) < 100 else 0
    return "/".join(f"{f(values):.{digits}f}" for f in (min, statistics.median, max))


@dataclass
class _Line:
    """Ops that differ in nothing but their layer."""

    first: Spent
    count: int = 0
    seconds: float = 0.0
    nbytes: int = 0
    flops: int = 0
    bound: float = 0.0


def profile_table(profile: Profile) -> Table:
    """Op by op: time, bytes, operations, and how near to its bound."""
    lines: dict[tuple[str, str, str], _Line] = {}
    for op in profile.ops:
        line = lines.setdefault((op.row.kind, op.row.detail, op.row.format), _Line(op))
        line.count += 1
        line.seconds += op.seconds
        line.nbytes += op.nbytes
        line.flops += op.flops
        line.bound += op.bound
    whole = sum(line.seconds for line in lines.values()) + profile.drawing
    table = Table(box=None, pad_edge=False)
    table.add_column("op", no_wrap=True)
    table.add_column("what", overflow="fold")
    table.add_column("format", no_wrap=True)
    for name in ("times", "us", "share", "MB", "GB/s", "GOP", "GOP/s", "bound us", "of it"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines.values():
        seconds = line.seconds or 1e-9
        table.add_row(
            line.first.row.kind,
            escape(line.first.row.detail),
            line.first.row.format,
            str(line.count),
            f"{line.seconds * 1e6:.0f}",
            f"{line.seconds / whole:.1%}",
            f"{line.nbytes / 1e6:.2f}",
            f"{line.nbytes / seconds / 1e9:.1f}",
            f"{line.flops / 1e9:.3f}",
            f"{line.flops / seconds / 1e9:.0f}",
            f"{line.bound * 1e6:.0f}",
            f"{line.bound / seconds:.0%}",
        )
    share = f"{profile.drawing / whole:.1%}"
    table.add_row("draw", "", "", "1", f"{profile.drawing * 1e6:.0f}", share, *[""] * 6)
    bound = sum(line.bound for line in lines.values())
    table.caption = (
        f"{profile.load.name}: {whole * 1e3:.2f} ms op by op, {profile.step * 1e3:.2f} ms as it runs fused; "
        f"bound {bound * 1e3:.2f} ms at {profile.limits.bandwidth / 1e9:.0f} GB/s"
    )
    return table
