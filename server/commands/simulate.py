"""`ktransformers simulate`: what tenants would get from the scheduler, under each policy, before they do."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ktransformers.scheduler.simulator import (
    POLICIES,
    Machine,
    Policy,
    Result,
    Simulation,
    TenantResult,
    percentile,
)
from ktransformers.scheduler.workload import Arrival, Load, generate, parse_load, read_trace
from ktransformers.server.commands.curves import Panel, svg

SAMPLES = 200
"""Points of the plot."""
_MOST_ROWS = 20
_MOST_TENANTS = 10_000
_MOST_REQUESTS = 1_000_000
"""Of one policy: some minutes. Nothing is said before it has been simulated."""
_WIDTH = 150


@dataclass(frozen=True)
class Options:
    """What to simulate."""

    tenants: tuple[str, ...] = ()
    trace: Path | None = None
    seconds: float = 300.0
    seed: int = 0
    policies: tuple[Policy, ...] = POLICIES
    machine: Machine = field(default_factory=Machine)


def options(
    tenants: list[str],
    trace: Path | None,
    seconds: float,
    seed: int,
    policies: list[str],
    blocks: int,
    slots: int,
    speed: float,
) -> Options:
    """As the flags say. Errors: ValueError."""
    if unknown := set(policies) - set(POLICIES):
        raise ValueError(f"unknown policy {min(unknown)!r} (policies: {', '.join(POLICIES)})")
    usual = Machine()
    machine = Machine(
        blocks=blocks,
        slots=slots,
        step=usual.step / speed,
        prompt=usual.prompt / speed,
        decode=usual.decode / speed,
        context=usual.context / speed,
        prompt_context=usual.prompt_context / speed,
    )
    chosen = tuple(policy for policy in POLICIES if policy in policies)
    return Options(tuple(tenants), trace, seconds, seed, chosen, machine)


def run(options: Options, plot_file: Path | None = None) -> int:
    """Simulate and print. Errors: ValueError for a description that cannot be used, OSError for a file."""
    if not options.tenants and options.trace is None:
        print("ktransformers: simulate needs --tenants or --trace", file=sys.stderr)
        return 1
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    loads = _loads(options)
    trace = read_trace(options.trace) if options.trace else None
    results = []
    for policy in options.policies:
        begin = time.monotonic()
        sample = options.seconds / SAMPLES if plot_file else 0.0
        result = _simulate(options, loads, trace, policy, sample)
        results.append(result)
        console.print(_summary(result, time.monotonic() - begin), markup=False)
        console.print(_table(result))
    if plot_file is not None:
        plot(results, plot_file)
        console.print(f"service over time: {plot_file}", markup=False)
    return 0


def _loads(options: Options) -> list[Load]:
    """What the tenants ask for. Errors: ValueError, also for more than can be simulated in a while."""
    for text in options.tenants:
        copies = text.partition(":")[0].partition("*")[2]
        if copies.isdecimal() and int(copies) > _MOST_TENANTS:  # before so many are made
            raise ValueError(f"{text!r}: simulate takes at most {_MOST_TENANTS:,} copies")
    loads = [load for text in options.tenants for load in parse_load(text)]
    if len(loads) > _MOST_TENANTS:
        raise ValueError(f"{len(loads):,} tenants: simulate takes at most {_MOST_TENANTS:,}")
    at_once = ("flood", "closed")
    asked = sum(load.count if load.kind in at_once else load.rate * options.seconds for load in loads)
    if asked > _MOST_REQUESTS:
        raise ValueError(
            f"the tenants ask for about {asked:,.0f} requests in {options.seconds:g} s, simulate takes at "
            f"most {_MOST_REQUESTS:,}: lower a rate, a count or --seconds"
        )
    return loads


def _simulate(
    options: Options, loads: list[Load], trace: list[Arrival] | None, policy: Policy, sample: float
) -> Result:
    arrivals = iter(trace) if trace is not None else generate(loads, options.seconds, options.seed)
    simulation = Simulation(arrivals, policy, options.machine, options.seed)
    return simulation.run(options.seconds, sample)


def _summary(result: Result, wall: float) -> str:
    status = result.status
    computed, queried = max(1, status.computed_tokens), max(1, status.prefix_query_tokens)
    return (
        f"{result.policy}: {len(result.tenants)} tenants, {result.seconds:.0f} s in {wall:.1f} s, "
        f"{status.generated_tokens / max(result.seconds, 1e-9):.0f} output tokens/s, "
        f"Jain {result.jain():.3f}, {status.preemptions} preemptions, "
        f"{status.recomputed_tokens / computed:.1%} recomputed, "
        f"{status.prefix_hit_tokens / queried:.0%} prefix hits; trace {result.digest[:12]}"
    )


def _table(result: Result) -> Table:
    table = Table("tenant", box=None, pad_edge=False)
    for name in ("weight", "asked", "done", "refused", "late", "service", "share", "due"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("TTFT p50", "p95", "p99", "ITL p50", "p95", "p99"):
        table.add_column(name, justify="right", no_wrap=True)
    whole = sum(t.service for t in result.tenants.values()) or 1.0
    weights = sum(t.weight for t in result.tenants.values()) or 1.0
    by_service = sorted(result.tenants.items(), key=lambda item: (-item[1].service, item[0]))
    for name, tenant in by_service[:_MOST_ROWS]:
        table.add_row(name, *_cells(tenant, whole, weights))
    if len(by_service) > _MOST_ROWS:
        rest = [tenant for _, tenant in by_service[_MOST_ROWS:]]
        table.add_row(f"{len(rest)} others", *_cells(_together(rest), whole, weights))
    return table


def _cells(tenant: TenantResult, whole: float, weights: float) -> list[str]:
    counts = (tenant.asked, tenant.done, tenant.refused, tenant.late)
    shares = (tenant.service / whole, tenant.weight / weights)
    return [
        f"{tenant.weight:g}",
        *(f"{count:,}" for count in counts),
        f"{tenant.service:,.0f}",
        *(f"{share:.1%}" for share in shares),
        *(f"{percentile(tenant.ttft, p):.2f}" for p in (0.5, 0.95, 0.99)),
        *(f"{percentile(tenant.itl, p):.3f}" for p in (0.5, 0.95, 0.99)),
    ]


def _together(tenants: list[TenantResult]) -> TenantResult:
    whole = TenantResult(weight=0.0)
    for tenant in tenants:
        whole.weight += tenant.weight
        whole.asked += tenant.asked
        whole.done += tenant.done
        whole.refused += tenant.refused
        whole.late += tenant.late
        whole.service += tenant.service
        whole.ttft.extend(tenant.ttft)
        whole.itl.extend(tenant.itl)
    return whole


def plot(results: list[Result], file: Path) -> None:
    """Service by weight of each tenant over time, a panel for each policy, as SVG. Errors: OSError."""
    panels = []
    for result in results:
        names = sorted(result.tenants, key=lambda name: -result.tenants[name].service)[:_MOST_ROWS]
        lines = []
        for name in sorted(names):
            weight = result.tenants[name].weight
            points = [(at, by_then.get(name, 0.0) / weight) for at, by_then in result.samples]
            lines.append((f"{name} (weight {weight:g})", points))
        panels.append(Panel(result.policy, lines))
    file.write_text(svg(panels, "seconds", "service by weight, units"), encoding="utf-8")
