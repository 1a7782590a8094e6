"""Some experts of each layer on the torch device, the others in csrc on the CPU, at the same time.

The torch executor runs everything else. At an Experts op the choices of experts that the CPU has are handed
over, the device computes its own, goes on with what does not need the sum (a shared MLP), and adds what the
CPU gives where the sum is read first. A row's sum is thus that of its device experts in router order, then
that of its CPU experts.

Deferral (`Placement.defer`, as in Chen et al., KTransformers, SOSP 2025): of each row, the CPU experts of the
smallest weights are added to the next layer's sum instead, so that the device's next attention need not wait
for them. It changes what the model computes.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch

from ktransformers.engine import _kernels
from ktransformers.engine.executors.beside import Beside, Buffers, Finish, beside
from ktransformers.engine.executors.native import pack
from ktransformers.engine.executors.torch import TorchExecutor, dequantise
from ktransformers.engine.executors.torch_experts import experts
from ktransformers.engine.executors.torch_limits import DTYPES
from ktransformers.engine.placement.place import ExpertsPlace, Placement, moved, swaps
from ktransformers.engine.placement.rules import CpuFormat
from ktransformers.engine.placement.statistics import Records
from ktransformers.engine.program import (
    Add,
    Experts,
    Gated,
    GatherRows,
    Linear,
    Op,
    Pieces,
    Program,
    RmsNorm,
    Tensor,
    ValueId,
    WeightId,
    expert_weights,
)
from ktransformers.engine.requantise import Requantiser

log = logging.getLogger(__name__)

_LOOK_STEPS: Final = 64
"""Steps after which counts are taken from the device."""
_SAVE_SECONDS: Final = 60.0
_SWAPS: Final = 2
"""Most experts of a layer that change places at once: each is read, dequantised and copied between two steps.
"""


def hybrid_executor(
    program: Program,
    placement: Placement,
    records: Records,
    *,
    device: str,
    threads: int,
    blocks: int,
    block_tokens: int,
    max_tokens: int,
    states: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TorchExecutor:
    """A torch executor whose routed experts are where `placement` says. ValueError names a tensor."""
    theirs = sum(program.weights[w].data.nbytes for w in expert_weights(program))
    total = sum(w.data.nbytes for w in program.weights)
    moe = HybridExperts(
        program,
        placement,
        records,
        device=torch.device(device),
        threads=threads,
        max_tokens=max_tokens,
        progress=lambda done: progress(done, total),
    )
    executor = TorchExecutor(
        program,
        device=device,
        threads=threads,
        blocks=blocks,
        block_tokens=block_tokens,
        max_tokens=max_tokens,
        states=states,
        progress=lambda done, _: progress(theirs + done, total),
        dtypes=[DTYPES[fmt] for fmt in placement.formats],
        elsewhere=moe,
    )
    executor.isa = f"{executor.isa}+{_kernels.isas()[0]}"
    return executor


@dataclass
class _Carried:
    """Deferred experts of the layer before."""

    finish: Finish
    gathered: bool
    """Whether its rows were those that draw a token already."""


@dataclass
class _Layer:
    """One op of experts, both sides of it."""

    place: ExpertsPlace
    op: Experts
    """The program's."""
    device_op: Experts
    """The same over the device's experts; its weights are numbers in `weights`."""
    weights: list[torch.Tensor]
    """gate, up, down [slots * rows, cols], then what biases there are [slots, rows]."""
    slot: torch.Tensor
    """int64 [experts] where the device has an expert, or -1."""
    host: torch.Tensor
    """float32 [experts] where the CPU has an expert that it is to compute, or -1."""
    counts: torch.Tensor
    """int64 [experts] choices since they were taken last."""
    gathered: bool
    """Whether rows are those that draw a token."""
    now: int | None = None
    """Its number in HostExperts; None: the CPU has no expert of it."""
    later: int | None = None
    """The same with the buffers for deferred experts; None: nothing of it is deferred."""
    buffers: tuple[Buffers, ...] = ()
    """Of `now`, then of `later`."""


class HybridExperts:
    """An engine.executors.torch.Elsewhere."""

    def __init__(
        self,
        program: Program,
        placement: Placement,
        records: Records,
        *,
        device: torch.device,
        threads: int,
        max_tokens: int,
        progress: Callable[[int], None],
    ) -> None:
        """Load all routed experts; `progress` is told bytes of the file done."""
        self._program, self._placement, self._records = program, placement, records
        self._device, self._max_tokens = device, max_tokens
        self._pool = _kernels.ThreadPool(threads)
        self._host = _kernels.HostExperts(self._pool, max_tokens)
        self._beside: Beside = beside(device, self._host)
        self._requantisers: dict[str, Requantiser] = {}
        self._shared: dict[tuple[object, ...], Buffers] = {}
        self.digests = [_digest_of(placement)]
        self._layers: dict[WeightId, _Layer] = {}
        self._due: dict[int, _Layer] = {}
        """The op before which a layer's sum must be whole."""
        self._begun: dict[WeightId, list[Finish]] = {}
        self._carried: _Carried | None = None
        self._steps = 0
        self._saved = time.monotonic()
        done = 0
        for number, place in enumerate(placement.experts):
            layer = self._load(place, number)
            self._layers[layer.op.gate] = layer
            self._due[_first_use(program.ops, place.op)] = layer
            done += sum(program.weights[w].data.nbytes for w in _matrices(layer.op))
            progress(done)
        self._report()

    # ---- a step

    @torch.inference_mode()
    def experts(
        self, op: Experts, x: torch.Tensor, routed: torch.Tensor, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        """See Elsewhere."""
        layer = self._layers[op.gate]
        chosen, share = routed[:, : op.top].long(), routed[:, op.top :]
        layer.counts.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        due: list[Finish] = []
        carried, self._carried = self._carried, None
        if layer.now is not None:
            now = layer.host[chosen]
            later = None
            if layer.later is not None:
                now, later = split(now, share, self._placement.defer)
            due.append(self._beside.begin(layer.now, x, torch.cat((now, share), -1), layer.buffers[0]))
            if layer.later is not None and later is not None:
                route = torch.cat((later, share), -1)
                finish = self._beside.begin(layer.later, x, route, layer.buffers[1])
                self._carried = _Carried(finish, layer.gathered)
        if carried is not None:
            dropped = layer.gathered and not carried.gathered
            due.append(partial(_rows, carried.finish, logit_rows) if dropped else carried.finish)
        self._begun[op.gate] = due
        if not layer.place.on_device:
            return x.new_zeros(len(x), layer.buffers[0].out.shape[1])
        return experts(layer.device_op, x, torch.cat((layer.slot[chosen].float(), share), -1), layer.weights)

    def before(self, index: int, values: list[torch.Tensor]) -> None:
        """See Elsewhere."""
        if index == 0:
            self._forget()
        layer = self._due.get(index)
        if layer is not None:
            for finish in self._begun.pop(layer.op.gate):
                values[layer.op.out] = values[layer.op.out] + finish()

    def after(self, tokens: int) -> None:
        """See Elsewhere."""
        self._steps += 1
        if self._steps % _LOOK_STEPS == 0:
            self.look()

    def look(self) -> None:
        """Take counts from the device; move experts, if the placement is adaptive; keep counts on disk."""
        statistics = self._records.statistics
        for layer in self._layers.values():
            statistics.add(layer.place.name, layer.counts.cpu().numpy())
            layer.counts.zero_()
            if layer.place.copied:
                for out, come in swaps(layer.place, statistics, _SWAPS):
                    self._swap(layer, out, come)
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self._saved = time.monotonic()
            self._records.save()

    @property
    def places(self) -> tuple[ExpertsPlace, ...]:
        """Where experts are now."""
        return tuple(layer.place for layer in self._layers.values())

    def close(self) -> None:
        """See Elsewhere."""
        self.look()
        self._records.save()
        self._beside.close()
        self._layers = {}

    def _forget(self) -> None:
        """A step that failed may have left something begun."""
        left = [finish for due in self._begun.values() for finish in due]
        if self._carried is not None:
            left.append(self._carried.finish)
        self._begun, self._carried = {}, None
        for finish in left:
            try:
                finish()
            except ValueError as error:
                log.debug("of a step that failed: %s", error)

    # ---- weights

    def _load(self, place: ExpertsPlace, number: int) -> _Layer:
        op = self._program.ops[place.op]
        if not isinstance(op, Experts):
            raise ValueError(f"placement: op {place.op} has no experts")
        tensors = [self._program.weights[w] for w in _matrices(op)]
        for t in tensors:
            self.digests += [_kernels.digest(self._pool, t.expert(e)) for e in range(t.experts)]
        biases = [None if w is None else self._floats(self._program.weights[w]) for w in _biases(op)]
        numbers = iter(range(3, 6))
        gate_bias, up_bias, down_bias = (None if b is None else next(numbers) for b in biases)
        layer = _Layer(
            place=place,
            op=op,
            device_op=replace(
                op,
                gate=0,
                up=1,
                down=2,
                gate_bias=gate_bias,
                up_bias=up_bias,
                down_bias=down_bias,
                experts=len(place.on_device),
            ),
            weights=[self._on_device(t, place) for t in tensors],
            slot=torch.full((place.experts,), -1, device=self._device),
            host=torch.full((place.experts,), -1.0, device=self._device),
            counts=torch.zeros(place.experts, dtype=torch.int64, device=self._device),
            gathered=any(isinstance(o, GatherRows) for o in self._program.ops[: place.op]),
        )
        device = torch.tensor(place.on_device, dtype=torch.int64, device=self._device)
        layer.weights += [b[device] for b in biases if b is not None]
        layer.slot[device] = torch.arange(len(device), device=self._device)
        self._load_host(layer, tensors, number)
        return layer

    def _load_host(self, layer: _Layer, tensors: list[Tensor], number: int) -> None:
        """The CPU's experts, and the buffers that they are given their input in."""
        place, op = layer.place, layer.op
        widths = (tensors[0].cols, 2 * op.top, tensors[2].rows // op.experts)
        layer.buffers = (self._buffers("now", *widths),)
        if not place.on_cpu:
            return
        isa = place.kernel or _kernels.isas()[0]
        weights = []
        for t in tensors:
            part = subset(t, place.in_memory)
            if place.cpu_format != "as-is":
                part = self._requantiser(place.cpu_format).made(part)
            try:
                weights.append(pack(self._pool, isa, part))
            except ValueError as error:
                raise ValueError(f"tensor '{t.name}': {error}") from error
        biases = [None if w is None else self._host_bias(w, place, isa) for w in _biases(op)]
        position = {e: float(i) for i, e in enumerate(place.in_memory)}
        for e in place.on_cpu:
            layer.host[e] = position[e]

        gate, up, down = weights
        gate_bias, up_bias, down_bias = biases

        def add(buffers: Buffers) -> int:
            # fmt: off
            return self._host.add(
                gate, up, down, gate_bias, up_bias, down_bias,
                op.top, op.act, op.alpha, op.limit, op.weigh_input,
                buffers.x.numpy(), buffers.route.numpy(), buffers.out.numpy(),
            )
            # fmt: on

        layer.now = add(layer.buffers[0])
        if self._placement.defer and number < len(self._placement.experts) - 1:
            # What one layer deferred is read after the next has begun to defer: two sets in turn.
            layer.buffers += (self._buffers(f"later {number % 2}", *widths),)
            layer.later = add(layer.buffers[1])

    def _requantiser(self, wanted: CpuFormat) -> Requantiser:
        if wanted not in self._requantisers:
            self._requantisers[wanted] = Requantiser(wanted, self._pool.threads)
        return self._requantisers[wanted]

    def _buffers(self, use: str, x: int, route: int, out: int) -> Buffers:
        """Shared by all layers of the same widths."""
        key = (use, x, route, out)
        if key not in self._shared:
            pinned = self._device.type == "cuda"
            self._shared[key] = Buffers.of(self._max_tokens, (x, route, out), pinned)
        return self._shared[key]

    def _host_bias(self, weight: WeightId, place: ExpertsPlace, isa: str) -> _kernels.Weight:
        t = self._program.weights[weight]
        rows = t.read().reshape(t.rows, -1)[list(place.in_memory)]
        return _kernels.pack(self._pool, isa, t.format, len(rows), t.cols, rows.reshape(-1))

    def _on_device(self, t: Tensor, place: ExpertsPlace) -> torch.Tensor:
        """[slots * rows, cols] of the experts that are there."""
        rows = t.rows // t.experts
        shape, dtype = (len(place.on_device) * rows, t.cols), DTYPES[place.device_format]
        weight = torch.empty(shape, dtype=dtype, device=self._device)
        for slot, e in enumerate(place.on_device):
            weight[slot * rows : (slot + 1) * rows] = self._floats(subset(t, (e,)))
        return weight

    def _floats(self, t: Tensor) -> torch.Tensor:
        return torch.from_numpy(dequantise(t)).to(self._device)

    def _swap(self, layer: _Layer, out: int, come: int) -> None:
        """Expert `come` takes the device's slot of `out`; the CPU has both."""
        slot = int(layer.slot[out])
        for weight, w in zip(layer.weights[:3], _matrices(layer.op), strict=True):
            one = self._floats(subset(self._program.weights[w], (come,)))
            weight[slot * len(one) : (slot + 1) * len(one)] = one
        theirs = [w for w in _biases(layer.op) if w is not None]
        for bias, w in zip(layer.weights[3:], theirs, strict=True):
            bias[slot] = self._floats(self._program.weights[w])[come]
        layer.slot[out], layer.slot[come] = -1, slot
        layer.host[out], layer.host[come] = float(layer.place.in_memory.index(out)), -1.0
        # The order of slots is no longer that of the numbers, which only loading relies on.
        layer.place = moved(layer.place, tuple(sorted({*layer.place.on_device, come} - {out})))
        log.debug("%s: expert %d takes the place of %d on the device", layer.place.name, come, out)

    def _report(self) -> None:
        """What was lost in loading, and what changes outputs."""
        for requantiser in self._requantisers.values():
            log.info("%s", requantiser.errors)
        if self._placement.defer:
            log.warning(
                "defer %d: of each token, as many of a layer's experts on the cpu are added one layer later; "
                "this changes outputs",
                self._placement.defer,
            )


def split(host: torch.Tensor, share: torch.Tensor, defer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The CPU's choices [rows, top] (below 0: not the CPU's) as those of now and those that are deferred: of
    each row the `defer` with the smallest weights `share`, of equals the earlier choice."""
    weights = share.masked_fill(host < 0, torch.inf)
    rank = weights.argsort(dim=-1, stable=True).argsort(dim=-1)
    late = (rank < defer) & (host >= 0)
    return host.masked_fill(late, -1.0), host.masked_fill(~late, -1.0)


def subset(t: Tensor, chosen: tuple[int, ...]) -> Tensor:
    """A tensor of some of the experts of another, read when it is read."""
    if len(chosen) == t.experts:
        return t
    data = Pieces(t.data.nbytes // t.experts * len(chosen), tuple(partial(t.expert, e) for e in chosen))
    return Tensor(t.name, t.format, t.rows // t.experts * len(chosen), t.cols, data, len(chosen))


def _rows(finish: Finish, rows: torch.Tensor) -> torch.Tensor:
    return finish()[rows]


def _matrices(op: Experts) -> tuple[WeightId, WeightId, WeightId]:
    return op.gate, op.up, op.down


def _biases(op: Experts) -> tuple[WeightId | None, WeightId | None, WeightId | None]:
    return op.gate_bias, op.up_bias, op.down_bias


def _first_use(ops: tuple[Op, ...], index: int) -> int:
    """The first op behind Experts `index` that may read its out. (The last op of a program does.)"""
    op = ops[index]
    out = op.out if isinstance(op, Experts) else -1
    return next(i for i in range(index + 1, len(ops)) if out in _reads(ops[i], out))


def _reads(op: Op, value: ValueId) -> tuple[ValueId, ...]:
    """What an op that may stand beside experts reads; any other is taken to read `value`."""
    match op:
        case Linear() | RmsNorm():
            return (op.x,)
        case Gated():
            return (op.gate, op.up)
        case Add():
            return (op.a, op.b)
        case _:
            return (value,)


def _digest_of(placement: Placement) -> int:
    """64 bits that tell placements apart: sums are rounded otherwise elsewhere, so KV is not the same."""
    return int.from_bytes(hashlib.sha256(repr(placement).encode()).digest()[:8], "little")
