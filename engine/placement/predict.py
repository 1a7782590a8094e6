"""What a placement costs: bytes and predicted time of each op, on the device and with the CPU beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ktransformers.engine import _kernels
from ktransformers.engine.explain import Row, explain, weights_of
from ktransformers.engine.limits import Limits
from ktransformers.engine.placement.place import SIZES, ExpertsPlace, Placement, experts_ops
from ktransformers.engine.placement.rules import DeviceFormat
from ktransformers.engine.placement.statistics import F64, ExpertStatistics
from ktransformers.engine.program import Embed, Experts, Program

_Q8_0: Final = 8


@dataclass(frozen=True)
class DeviceLimits:
    """What a torch device does at most, measured."""

    name: str
    bandwidth: float
    """Bytes per second that it reads of its memory."""
    peaks: Mapping[DeviceFormat, float]
    """Operations per second of a product."""

    def seconds(self, nbytes: float, flops: float, kind: DeviceFormat) -> float:
        """The least that reading and computing take when they overlap: the roofline."""
        return max(nbytes / self.bandwidth, flops / self.peaks[kind])


def measure_device(device: str, threads: int) -> DeviceLimits:
    """Measure a torch device, with so many threads if it is the CPU; torch is there."""
    from ktransformers.engine.executors import torch_limits

    return torch_limits.device_limits(device, threads)


@dataclass(frozen=True)
class PlacedRow:
    """One op in one step."""

    row: Row
    """What it costs the native executor, and what it is."""
    formats: str
    """On the device, and with the CPU where that has a part."""
    device_bytes: int
    """Of its weights on the device; of a table that two ops read, with the first."""
    cpu_bytes: int
    on_device: int
    """Experts there; 0 for another op."""
    device_seconds: float
    """Predicted for the whole step."""
    cpu_seconds: float

    @property
    def seconds(self) -> float:
        """Both sides at once."""
        return max(self.device_seconds, self.cpu_seconds)


def predict(
    program: Program,
    placement: Placement,
    statistics: ExpertStatistics,
    device: DeviceLimits,
    host: Limits,
    *,
    tokens: int = 1,
    context: int = 0,
) -> list[PlacedRow]:
    """One row for each op of a step, as engine.explain. Copies between the sides, some KB a layer, are not in
    it, nor what deferral hides."""
    places = {place.op: place for place in placement.experts}
    seen: set[int] = set()
    rows = []
    for row in explain(program, host, tokens=tokens, context=context):
        if row.index in places:
            place = places[row.index]
            rows.append(_experts(program, place, statistics, device, host, row, tokens))
            continue
        weights = weights_of(program.ops[row.index])
        held = sum(_device_bytes(program, placement, w) for w in weights if w not in seen)
        seen.update(weights)
        rows.append(_dense(program, placement, device, row, 1 if row.drawn else tokens, held))
    return rows


def _device_bytes(program: Program, placement: Placement, weight: int) -> int:
    w = program.weights[weight]
    return w.rows * w.cols * SIZES[placement.formats[weight]]


def _dense(
    program: Program, placement: Placement, device: DeviceLimits, row: Row, computed: int, held: int
) -> PlacedRow:
    op = program.ops[row.index]
    weights = weights_of(op)
    kinds = sorted({placement.formats[w] for w in weights})
    read = sum(_device_bytes(program, placement, w) for w in weights)
    if isinstance(op, Embed):
        read //= program.weights[op.table].rows
    kind = placement.formats[weights[0]] if weights else "f32"
    # Keys and values are float32 there, twice what the native executor has.
    seconds = device.seconds(read + 2 * row.kv_bytes, row.flops * computed, kind)
    return PlacedRow(row, ", ".join(kinds), held, 0, 0, seconds, 0.0)


def _experts(
    program: Program,
    place: ExpertsPlace,
    statistics: ExpertStatistics,
    device: DeviceLimits,
    host: Limits,
    row: Row,
    tokens: int,
) -> PlacedRow:
    computed = 1 if row.drawn else tokens
    chance = chances(place, statistics.of(place.name))
    read = 1 - (1 - chance) ** computed
    there, here = list(place.on_device), list(place.on_cpu)
    op = next(op for index, op in experts_ops(program) if index == place.op)
    flops = row.flops / place.top * computed
    dot = _kernels.activation(place.kernel or host.isa, _cpu_format(program, op, place))
    return PlacedRow(
        row=row,
        formats=" + ".join(
            ([place.device_format] if there else [])
            + ([row.format if place.cpu_format == "as-is" else place.cpu_format] if here else [])
        ),
        device_bytes=place.device_bytes,
        cpu_bytes=place.cpu_bytes,
        on_device=len(there),
        device_seconds=device.seconds(
            float(read[there].sum()) * place.device_expert,
            float(chance[there].sum()) * flops,
            place.device_format,
        ),
        cpu_seconds=host.seconds(
            float(read[here].sum()) * place.cpu_expert, float(chance[here].sum()) * flops, dot
        ),
    )


def _cpu_format(program: Program, op: Experts, place: ExpertsPlace) -> int:
    """Of gate: which dot product the CPU spends its time in. Q8_0 and Q4_0 use the same."""
    return program.weights[op.gate].format if place.cpu_format == "as-is" else _Q8_0


def chances(place: ExpertsPlace, counts: F64) -> F64:
    """[experts] that a token chooses each: as counted, or all alike where nothing is known. Their sum is at
    most `top`."""
    if counts.sum() <= 0:
        return counts * 0 + place.top / place.experts
    chance: F64 = (place.top * counts / counts.sum()).clip(max=1.0)
    return chance
