"""From rules, memory and statistics to a placement: where each weight and each expert is, in which format.

What a step always reads goes to the device: attention, dense MLPs, shared experts, routers, KV. The room that
is left takes routed experts, the hottest first; the others stay with the CPU, which computes them beside.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, cast

from ktransformers.engine.placement.rules import (
    CPU_FORMATS,
    DEVICE_FORMATS,
    DEVICE_KERNEL,
    CpuFormat,
    DeviceFormat,
    PlacementError,
    Policy,
    Rules,
)
from ktransformers.engine.placement.statistics import ExpertStatistics
from ktransformers.engine.program import (
    Embed,
    Experts,
    HeadLinear,
    Linear,
    Logits,
    Program,
    WeightId,
    expert_weights,
)
from ktransformers.engine.requantise import requantised_bytes

SIZES: Final[dict[DeviceFormat, int]] = {"f32": 4, "bf16": 2}
"""Bytes of an element on the device."""


@dataclass(frozen=True)
class ExpertsPlace:
    """Where the experts of one op are."""

    op: int
    """Its number in the program."""
    name: str
    """blk.N.experts"""
    experts: int
    top: int
    on_device: tuple[int, ...]
    """Ascending."""
    fixed: frozenset[int]
    """Experts that a rule has placed: policies leave them where they are."""
    copied: bool
    """Whether the CPU keeps the device's experts, too, so that any of them can change places."""
    device_format: DeviceFormat
    cpu_format: CpuFormat
    kernel: str
    """Of the CPU's experts; "" is the best one."""
    device_expert: int
    """Bytes of one expert on the device."""
    cpu_expert: int
    """Bytes of one expert with the CPU."""

    @property
    def on_cpu(self) -> tuple[int, ...]:
        """The experts that the CPU computes; ascending."""
        device = set(self.on_device)
        return tuple(e for e in range(self.experts) if e not in device)

    @property
    def in_memory(self) -> tuple[int, ...]:
        """The experts that the CPU holds; ascending."""
        return tuple(range(self.experts)) if self.copied else self.on_cpu

    @property
    def device_bytes(self) -> int:
        return len(self.on_device) * self.device_expert

    @property
    def cpu_bytes(self) -> int:
        return len(self.in_memory) * self.cpu_expert


@dataclass(frozen=True)
class Placement:
    """Where everything is."""

    policy: Policy
    defer: int
    """Of each token, so many experts of a layer that the CPU computes, those of the smallest weights, are
    added one layer later; 0 is none. It changes what the model computes."""
    formats: tuple[DeviceFormat, ...]
    """Of each weight of the program that is not one of routed experts; "f32" for those."""
    dense_bytes: int
    """On the device, of all but routed experts."""
    experts: tuple[ExpertsPlace, ...]
    """In the order of the program."""

    def __str__(self) -> str:
        """One line."""
        device, experts = sum(len(p.on_device) for p in self.experts), sum(p.experts for p in self.experts)
        sides = f"{self.device_bytes / 1e6:,.0f} MB there, {self.cpu_bytes / 1e6:,.0f} MB with the cpu"
        late = f"; {self.defer} of a token deferred, which changes outputs" if self.defer else ""
        return f"placement: {device} of {experts} experts on the device ({self.policy}), {sides}{late}"

    @property
    def device_bytes(self) -> int:
        """Of all weights on the device."""
        return self.dense_bytes + sum(place.device_bytes for place in self.experts)

    @property
    def cpu_bytes(self) -> int:
        """Of the weights with the CPU."""
        return sum(place.cpu_bytes for place in self.experts)

    @property
    def fixed_device_bytes(self) -> int:
        """Of the experts that rules put on the device."""
        return sum(p.device_expert * len(p.fixed & set(p.on_device)) for p in self.experts)

    @property
    def all_cpu_bytes(self) -> int:
        """What all experts but those that rules put on the device would take with the CPU."""
        return sum(p.cpu_expert * (p.experts - len(p.fixed & set(p.on_device))) for p in self.experts)


def place(program: Program, rules: Rules, room: int, statistics: ExpertStatistics) -> Placement:
    """Give the experts that no rule has placed `room` bytes of the device, less what rules give it.

    With more room no expert leaves the device, and what all of them take is never more than `room`.
    PlacementError for a rule that matches nothing, does not go with what it matches, or does not fit.
    """
    _check_matches(program, rules)
    places = [_resolved(program, rules, index, op) for index, op in experts_ops(program)]
    if rules.defer and any(place.top <= rules.defer for place in places):
        top = min(place.top for place in places)
        raise PlacementError(f"{rules.where}: defer: {rules.defer} of {top} experts: must be less than all")
    room = max(room, 0)
    left = room - sum(place.device_bytes for place in places)
    if left < 0:
        raise PlacementError(
            f"{rules.where}: the rules put {(room - left) / 2**20:,.1f} MiB of experts on the device, where "
            f"{room / 2**20:,.1f} MiB are left for them: place fewer, give them format 'bf16', raise "
            "memory_bytes, or lower cache.device_bytes"
        )
    chosen = [set(place.on_device) for place in places]
    for i, expert in _hottest(rules.policy, places, statistics):
        # Who does not fit ends it: smaller ones behind would be in one placement, and out with more room.
        if places[i].device_expert > left:
            break
        left -= places[i].device_expert
        chosen[i].add(expert)
    return Placement(
        policy=rules.policy,
        defer=rules.defer,
        formats=tuple(dense_formats(program, rules)),
        dense_bytes=dense_bytes(program, rules),
        experts=tuple(
            moved(place, tuple(sorted(experts))) for place, experts in zip(places, chosen, strict=True)
        ),
    )


def moved(place: ExpertsPlace, on_device: tuple[int, ...]) -> ExpertsPlace:
    """The same with other experts on the device."""
    return replace(place, on_device=on_device)


def experts_ops(program: Program) -> Iterator[tuple[int, Experts]]:
    """The ops of routed experts, with their numbers."""
    for index, op in enumerate(program.ops):
        if isinstance(op, Experts):
            yield index, op


def experts_name(program: Program, op: Experts) -> str:
    """blk.N.experts, after the name of its first weight; only a program made by hand has other names."""
    layer = program.weights[op.gate].name.split(".")[:2]
    return ".".join((*layer, "experts"))


def dense_bytes(program: Program, rules: Rules) -> int:
    """Bytes on the device of all weights but those of routed experts."""
    routed = expert_weights(program)
    rows = enumerate(zip(program.weights, dense_formats(program, rules), strict=True))
    return sum(w.rows * w.cols * SIZES[fmt] for i, (w, fmt) in rows if i not in routed)


# ---- rules and names


def _names(program: Program, op: Experts) -> tuple[str, ...]:
    """By which rules may call an op of experts."""
    return experts_name(program, op), *(_weight_name(program, w) for w in (op.gate, op.up, op.down))


def _weight_name(program: Program, weight: WeightId) -> str:
    return program.weights[weight].name.removesuffix(".weight")


def _check_matches(program: Program, rules: Rules) -> None:
    """Each rule matches something, and says nothing that this cannot honour."""
    dense = [_weight_name(program, w) for w in _matrices(program)]
    ops = [(_names(program, op), op) for _, op in experts_ops(program)]
    for number, rule in enumerate(rules.rules):
        plain = [name for name in dense if rule.matches(name)]
        matched = [op for names, op in ops if any(map(rule.matches, names))]
        if not plain and not matched:
            some = ", ".join(dict.fromkeys((*(names[0] for names, _ in ops[:2]), *dense[:6])))
            raise rules.error(number, f"match {rule.match!r} matches nothing; there are {some} ...")
        on_cpu = rule.device == "cpu" or rule.format in CPU_FORMATS
        if plain and (on_cpu or rule.kernel not in (None, DEVICE_KERNEL)):
            what = f"match {rule.match!r} means {plain[0]}, too, and only experts can be on the cpu"
            raise rules.error(number, f"{what}: match '*.experts' or one of them")
        if rule.experts is None:
            continue
        if plain:
            raise rules.error(number, f"experts: {plain[0]}, which match {rule.match!r} means, has none")
        for op in matched:
            if max(rule.experts) >= op.experts:
                name = experts_name(program, op)
                raise rules.error(number, f"experts: {max(rule.experts)}: {name} has 0 to {op.experts - 1}")


def dense_formats(program: Program, rules: Rules) -> Iterator[DeviceFormat]:
    """Of each weight. What is not a product's matrix stays in float32: it is small."""
    matrices = set(_matrices(program))
    for w in range(len(program.weights)):
        yield _device_format(rules, (_weight_name(program, w),)) if w in matrices else "f32"


def _matrices(program: Program) -> Iterator[WeightId]:
    """The weights of products, but those of routed experts: what rules may speak of beside these."""
    for op in program.ops:
        match op:
            case Embed():
                yield op.table
            case Linear():
                yield from (part.weight for part in op.parts)
            case HeadLinear() | Logits():
                yield op.weight
            case _:
                pass


def _device_format(rules: Rules, names: tuple[str, ...]) -> DeviceFormat:
    return cast(DeviceFormat, _first(rules, "format", names, DEVICE_FORMATS) or "f32")


def _first(rules: Rules, field: str, names: tuple[str, ...], values: tuple[str, ...]) -> str | None:
    """What the first matching rule that says one of `values` says."""
    for rule in rules.rules:
        said: str | None = getattr(rule, field)
        if said in values and any(map(rule.matches, names)):
            return said
    return None


def _resolved(program: Program, rules: Rules, index: int, op: Experts) -> ExpertsPlace:
    """An op of experts with what rules say of it, and on the device only what they put there."""
    names = _names(program, op)
    device_format = _device_format(rules, names)
    cpu_format = cast(CpuFormat, _first(rules, "format", names, CPU_FORMATS) or "as-is")
    kernels = tuple(rule.kernel for rule in rules.rules if rule.kernel and rule.kernel != DEVICE_KERNEL)
    placed: dict[int, str] = {}
    for rule in rules.rules:
        if rule.device is not None and any(map(rule.matches, names)):
            for expert in range(op.experts) if rule.experts is None else rule.experts:
                placed.setdefault(expert, rule.device)
    tensors = [program.weights[w] for w in (op.gate, op.up, op.down)]
    elements = sum(w.rows * w.cols for w in tensors) // op.experts
    return ExpertsPlace(
        op=index,
        name=names[0],
        experts=op.experts,
        top=op.top,
        on_device=tuple(sorted(e for e, device in placed.items() if device == "device")),
        fixed=frozenset(placed),
        copied=rules.policy == "adaptive" and len(placed) < op.experts,
        device_format=device_format,
        cpu_format=cpu_format,
        kernel=_first(rules, "kernel", names, kernels) or "",
        device_expert=elements * SIZES[device_format],
        cpu_expert=sum(requantised_bytes(w, cpu_format) for w in tensors) // op.experts,
    )


# ---- hot experts


def _hottest(
    policy: Policy, places: list[ExpertsPlace], statistics: ExpertStatistics
) -> Iterator[tuple[int, int]]:
    """(index of the op, expert) of those that no rule has placed, the most wanted first.

    "uniform" takes the same number of every layer. The others take what was chosen most often; where nothing
    is known they are uniform, too.
    """
    ranked: list[tuple[float, int, int, int]] = []
    for i, place in enumerate(places):
        counts = statistics.of(place.name)
        free = [e for e in range(place.experts) if e not in place.fixed]
        for rank, expert in enumerate(free):
            ranked.append((0.0 if policy == "uniform" else -counts[expert], rank, i, expert))
    for _, _, i, expert in sorted(ranked):
        yield i, expert


# A change must be worth a copy of the expert: it is chosen by so much more often, and often at all.
_WORTH: Final = 1.25
_ENOUGH: Final = 16.0


def swaps(place: ExpertsPlace, statistics: ExpertStatistics, most: int) -> list[tuple[int, int]]:
    """(expert that leaves the device, expert that comes), at most `most`: adaptive placement as it serves."""
    counts = statistics.of(place.name)
    here = sorted((e for e in place.on_device if e not in place.fixed), key=lambda e: (counts[e], -e))
    there = sorted((e for e in place.on_cpu if e not in place.fixed), key=lambda e: (-counts[e], e))
    pairs = zip(here[:most], there[:most], strict=False)
    return [(out, come) for out, come in pairs if counts[come] > _WORTH * counts[out] + _ENOUGH]
