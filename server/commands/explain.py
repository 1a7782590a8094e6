"""`ktransformers explain`: what a model costs, op by op, and whether it fits."""

import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ktransformers.engine.config import EngineConfig
from ktransformers.engine.explain import Row, explain
from ktransformers.engine.limits import measure
from ktransformers.engine.load import Facts, open_model
from ktransformers.engine.placement.predict import PlacedRow, measure_device, predict
from ktransformers.engine.plan import CannotFit, Plan, plan


@dataclass
class _Line:
    """Equal ops of several layers."""

    first: Row
    layers: list[int]
    weight_bytes: int = 0
    kv_bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    def add(self, row: Row) -> None:
        if row.layer is not None and row.layer not in self.layers:
            self.layers.append(row.layer)
        self.weight_bytes += row.weight_bytes
        self.kv_bytes += row.kv_bytes
        self.flops += row.flops
        self.seconds += row.seconds


def run(config: EngineConfig, tokens: int, context: int, every_op: bool) -> int:
    """Print the table; the exit code. Errors: OSError, ValueError (GgufError, ModelError)."""
    # A pipe has no width: wide enough for a line an op.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    if config.placement:
        return _placed(console, config, tokens, context, every_op)
    program, facts = open_model(config)
    _check_fits(facts, tokens, context)
    with console.status("measuring this machine"):
        limits = measure(config.threads)
    kv_format = config.cache.kv_format
    rows = explain(program, limits, tokens=tokens, context=context, kv_format=kv_format)
    lines = _merge(rows, every_op)
    peaks = ", ".join(f"{rate / 1e9:.0f} {dot}" for dot, rate in limits.peaks.items() if rate)
    console.print(
        f"[bold]{escape(facts.name)}[/] ({facts.spec.architecture}), {escape(Path(config.model).name)}: "
        f"a step of {tokens} tokens after {context}; this machine reads {limits.bandwidth / 1e9:.1f} GB/s "
        f"and computes {peaks} GOP/s with {limits.threads} threads ({limits.isa})"
    )
    console.print(_table(lines))
    seconds = sum(row.seconds for row in rows)
    console.print(f"Predicted for one sequence: {seconds * 1e3:.2f} ms a token, {1 / seconds:.1f} tokens/s")
    try:
        planned = plan(config, program, facts)
    except CannotFit as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return 1
    _print_needs(console, planned)
    return 0


def _check_fits(facts: Facts, tokens: int, context: int) -> None:
    """Errors: ValueError, for a step that no sequence is long enough for."""
    if tokens + context > facts.spec.context:
        longest = f"this model was trained for sequences of {facts.spec.context}"
        raise ValueError(f"{tokens} tokens after {context}: {longest}")


def _print_needs(console: Console, planned: Plan) -> None:
    for what, size in planned.needs:
        console.print(f"  {what:<28}{size / 2**20:>12,.1f} MiB")
    console.print(f"  {'available memory':<28}{planned.available / 2**20:>12,.1f} MiB")
    console.print(f"  longest sequence {planned.max_len} tokens, {planned.blocks} blocks")


def _placed(console: Console, config: EngineConfig, tokens: int, context: int, every_op: bool) -> int:
    """What is where, and what a step takes; the exit code."""
    program, facts = open_model(config)
    _check_fits(facts, tokens, context)
    try:
        planned = plan(config, program, facts)
    except CannotFit as error:
        console.print(f"[red]{escape(str(error))}[/]")
        return 1
    hybrid = planned.hybrid
    if hybrid is None or config.torch_device is None:
        raise ValueError("placement: there is none")
    with console.status("measuring this machine"):
        host, device = measure(planned.threads), measure_device(config.torch_device, planned.threads)
    sizes = {"tokens": tokens, "context": context}
    statistics = hybrid.records.statistics
    rows = predict(program, hybrid.placement, statistics, device, host, **sizes)
    peaks = ", ".join(f"{rate / 1e9:.0f} {name}" for name, rate in device.peaks.items())
    console.print(
        f"[bold]{escape(facts.name)}[/] ({facts.spec.architecture}), {escape(Path(config.model).name)}: "
        f"a step of {tokens} tokens after {context}; device {device.name} reads "
        f"{device.bandwidth / 1e9:.1f} GB/s and computes {peaks} GOP/s; the cpu reads "
        f"{host.bandwidth / 1e9:.1f} GB/s with {host.threads} threads ({host.isa})"
    )
    console.print(_placed_table(rows, every_op))
    console.print(escape(str(hybrid.placement)), soft_wrap=True)
    known = f"{statistics.total:,.0f} choices counted"
    console.print(f"  of experts: {known if statistics.total else 'nothing known yet, all alike'}")
    seconds = sum(row.seconds for row in rows) / tokens
    console.print(f"Predicted for one sequence: {seconds * 1e3:.2f} ms a token, {1 / seconds:.1f} tokens/s")
    _print_needs(console, planned)
    return 0


def _placed_table(rows: list[PlacedRow], every_op: bool) -> Table:
    """A line for each op, or for each kind of op that differs in nothing but its layer."""
    table = Table("layer", "op", "what", "format", box=None, pad_edge=False)
    for name in ("on device", "device MB", "cpu MB", "device us", "cpu us"):
        table.add_column(name, justify="right", no_wrap=True)
    lines: dict[object, list[PlacedRow]] = {}
    for placed in rows:
        r = placed.row
        key = r.index if every_op or r.layer is None else (r.kind, r.detail, placed.formats, placed.on_device)
        lines.setdefault(key, []).append(placed)
    for line in lines.values():
        first = line[0]
        layers = dict.fromkeys(placed.row.layer for placed in line if placed.row.layer is not None)
        table.add_row(
            _span(list(layers)),
            first.row.kind,
            escape(first.row.detail.replace(".weight", "")),
            first.formats,
            str(first.on_device) if first.row.kind == "Experts" else "",
            f"{sum(p.device_bytes for p in line) / 1e6:.2f}",
            f"{sum(p.cpu_bytes for p in line) / 1e6:.2f}",
            f"{sum(p.device_seconds for p in line) * 1e6:.0f}",
            f"{sum(p.cpu_seconds for p in line) * 1e6:.0f}",
        )
    return table


def _merge(rows: list[Row], every_op: bool) -> list[_Line]:
    """Ops that differ in nothing but their layer share a line, where the first of them stands."""
    lines: dict[object, _Line] = {}
    for row in rows:
        key = row.index if every_op or row.layer is None else (row.kind, row.detail, row.format)
        lines.setdefault(key, _Line(row, [])).add(row)
    return list(lines.values())


def _table(lines: list[_Line]) -> Table:
    table = Table("layer", "op", "what", "format", show_footer=False, box=None, pad_edge=False)
    for name in ("weights MB", "KV MB", "MFLOP", "us", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    whole = sum(line.seconds for line in lines) or 1.0
    for line in lines:
        table.add_row(
            _span(line.layers),
            line.first.kind,
            escape(line.first.detail.replace(".weight", "")),
            line.first.format,
            f"{line.weight_bytes / 1e6:.2f}",
            f"{line.kv_bytes / 1e6:.2f}",
            f"{line.flops / 1e6:.2f}",
            f"{line.seconds * 1e6:.0f}",
            f"{line.seconds / whole:.1%}",
        )
    return table


def _span(layers: list[int]) -> str:
    if not layers:
        return ""
    if layers == list(range(layers[0], layers[-1] + 1)):
        return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
    return f"{layers[0]}, {layers[1]}, ... ({len(layers)})"
