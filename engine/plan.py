"""What of a model and its KV fits in memory: the pool, the longest sequence, where experts are."""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Final

from ktransformers.engine import machine
from ktransformers.engine.batch import URGENT_TOKENS
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.load import Facts
from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.placement.open import Hybrid, open_placement, placement_rules
from ktransformers.engine.placement.place import Placement, dense_bytes, place
from ktransformers.engine.placement.rules import PlacementError, Rules
from ktransformers.engine.program import Logits, Program, expert_weights

HEADROOM: Final = 0.25
MOST_HEADROOM: Final = 2 << 30
"""Share of the available memory that is left alone, and bytes that are enough of it."""
POOL_SHARE: Final = 0.4
"""Largest share of the available memory that a KV pool takes by itself."""
HOST_SHARE: Final = 0.25
"""Share of the machine's available memory that the host tier of a device with its own takes by itself."""
SMALLEST_CONTEXT: Final = 1024
"""Tokens that must fit in a pool sized by itself (or the model's context, if that is shorter)."""


@dataclass(frozen=True)
class Plan:
    """What the executor is built with."""

    threads: int
    blocks: int
    block_bytes: int
    host_blocks: int
    """Of the host tier; 0: there is none."""
    states: int
    """Places for states: one for each sequence, the others for copies that prefixes are found with; 0: the
    model has none."""
    max_len: int
    """Longest sequence in tokens."""
    needs: tuple[tuple[str, int], ...]
    """(what, bytes) of everything large."""
    available: int
    """Bytes of memory when the plan was made."""
    hybrid: Hybrid | None = None
    """None: the executor has all of the model."""


class CannotFit(ModelError):
    """The model and the smallest useful KV pool need more memory than there is. The message is a table."""

    def __init__(self, needs: tuple[tuple[str, int], ...], available: int, limit: int | None = None) -> None:
        """`limit`: bytes that a placement allows of a device, instead of what is available."""
        rows = [*needs, ("needed", sum(n for _, n in needs))]
        if limit is None:
            rows += [("available", available), ("usable (some stays free)", usable(available))]
        else:
            rows += [("memory_bytes of the placement", limit)]
        table = "\n".join(f"  {what:<28}{n / 2**20:>12,.1f} MiB" for what, n in rows)
        super().__init__(
            f"the model does not fit in memory:\n{table}\n"
            "free memory, or lower cache.device_bytes, cache.host_bytes, context, max_batch_tokens or "
            "max_sequences; "
            + (
                "experts can stay on disk (expert_bytes)"
                if limit is None
                else "or raise memory_bytes, or give weights format 'bf16' in the placement"
            )
        )


def usable(available: int) -> int:
    """Of the available bytes, those that a model may take."""
    return available - min(int(available * HEADROOM), MOST_HEADROOM)


def plan(config: EngineConfig, program: Program, facts: Facts, available: int | None = None) -> Plan:
    """Size the KV pool and cap the context. ModelError when the settings do not go together, CannotFit.

    A pool with no size given holds what `max_sequences` full sequences need, within the free memory.
    """
    if config.torch_device is not None:
        _need_torch()
    rules = placement_rules(config)
    memory = _memory(config, rules, _device_memory(config) if available is None else available)
    hybrid = None
    if rules is not None:
        hybrid = open_placement(config, program, facts.identity.hex(), rules)
        if memory.limit is None and not _has_own_memory(config):
            # The same memory holds what the CPU keeps: enough for all experts stays free of the device's.
            memory = replace(memory, for_cpu=hybrid.placement.all_cpu_bytes)
    trained = facts.spec.context
    wanted = trained if config.context is None else config.context
    if wanted > trained:
        raise ModelError(f"context: {wanted} is longer than the {trained} tokens this model was trained for")
    block = block_bytes(config, program)
    host_blocks = _host_bytes(config) // block if program.state is None else 0
    states = _states(config, program)
    needs = _fixed_needs(config, program, facts, rules)
    if program.state is not None:
        needs = (*needs, (f"states, {states}", states * 4 * program.state.elements))
    if host_blocks and not _has_own_memory(config):
        needs = (*needs, (f"KV cache of the host, {host_blocks} blocks", host_blocks * block))
    # What rules put on the device is not for the pool to take.
    placed = 0 if hybrid is None else hybrid.placement.fixed_device_bytes
    blocks = _pool(config, wanted, block, memory, needs, placed)
    needs = (*needs, (f"KV cache, {blocks} blocks", blocks * block))
    if rules is not None and hybrid is not None:
        left = memory.free - sum(n for _, n in needs)
        placement = place(program, rules, left, hybrid.records.statistics)
        hybrid = replace(hybrid, placement=placement)
        needs = (*needs, *_expert_needs(config, placement, needs, memory.machine))
    return Plan(
        threads=config.threads or machine.cpus(),
        blocks=blocks,
        block_bytes=block,
        host_blocks=host_blocks,
        states=states,
        max_len=min(wanted, blocks * config.cache.block_tokens),
        needs=needs,
        available=memory.available,
        hybrid=hybrid,
    )


@dataclass(frozen=True)
class _Memory:
    """Bytes where the model will live."""

    available: int
    """Free there, or what rules allow of it."""
    limit: int | None
    """What rules allow; None: they do not say."""
    machine: int
    """Free of the machine's own memory."""
    for_cpu: int = 0
    """Left to the CPU's experts, in the same memory."""

    @property
    def free(self) -> int:
        """What the device may take."""
        return (usable(self.available) if self.limit is None else self.limit) - self.for_cpu


def _memory(config: EngineConfig, rules: Rules | None, available: int) -> _Memory:
    """PlacementError for rules that allow more than the `available` bytes of the device."""
    limit = None if rules is None else rules.memory_bytes
    own = machine.available_memory() if _has_own_memory(config) else available
    if rules is not None and limit is not None and limit > available:
        raise PlacementError(f"{rules.where}: memory_bytes {limit}: the device has {available} free")
    return _Memory(available if limit is None else limit, limit, own)


def _pool(
    config: EngineConfig,
    context: int,
    block: int,
    memory: _Memory,
    needs: tuple[tuple[str, int], ...],
    placed: int,
) -> int:
    """KV blocks of `block` bytes beside what is needed in any case, and what is `placed`. CannotFit."""
    size = config.cache.block_tokens
    fixed = sum(n for _, n in needs)
    # A context that was asked for must fit whole.
    least = -(-(context if config.context is not None else min(context, SMALLEST_CONTEXT)) // size)
    if config.cache.device_bytes is not None:
        blocks = config.cache.device_bytes // block
        if blocks < least:
            what = f"{config.cache.device_bytes} bytes are {blocks} blocks of {block} bytes"
            raise ModelError(f"cache.device_bytes: {what}; one sequence needs {least}")
        room = memory.available - fixed
    else:
        room = memory.free - fixed - placed
        useful = config.max_sequences * -(-context // size)
        blocks = max(min(useful, int(memory.available * POOL_SHARE) // block, room // block), least)
    if blocks * block > room:
        pool = (f"KV cache, {blocks} blocks", blocks * block)
        cpu = (("experts on the cpu", memory.for_cpu),) if memory.for_cpu else ()
        raise CannotFit((*needs, pool, *cpu), memory.available, memory.limit)
    return blocks


def _states(config: EngineConfig, program: Program) -> int:
    """Places for states. ModelError for tiers that would keep KV without the states it is worthless
    without."""
    if program.state is None:
        return 0
    for name in ("host_bytes", "disk_bytes"):
        if getattr(config.cache, name):
            what = "this model's sequences have a state, and their prefixes are kept on the device only"
            raise ModelError(f"cache.{name}: {what}")
    return config.max_sequences * (2 if config.cache.prefix_reuse else 1)


def _expert_needs(
    config: EngineConfig, placement: Placement, needs: tuple[tuple[str, int], ...], memory: int
) -> tuple[tuple[str, int], ...]:
    """What experts take, on both sides. CannotFit when the machine's `memory` does not hold the CPU's."""
    device = ("experts on the device", sum(p.device_bytes for p in placement.experts))
    cpu = ("experts on the cpu", placement.cpu_bytes)
    there = (cpu,) if _has_own_memory(config) else (*needs, device, cpu)
    if sum(n for _, n in there) > usable(memory):
        raise CannotFit(there, memory)
    return device, cpu


def _fixed_needs(
    config: EngineConfig, program: Program, facts: Facts, rules: Rules | None
) -> tuple[tuple[str, int], ...]:
    """Bytes of weights and of the values of the largest step."""
    last = program.ops[-1]
    wide = {last.out} if isinstance(last, Logits) else set()
    row = sum(width for v, width in enumerate(program.widths) if v not in wide)
    tokens, sequences = config.max_batch_tokens, config.max_sequences
    if config.executor == "native" and config.expert_bytes is None:
        # Urgent steps have values of their own.
        tokens += min(URGENT_TOKENS, config.max_batch_tokens)
        sequences += min(URGENT_TOKENS, config.max_sequences)
    activations = 4 * (row * tokens + program.vocab * sequences)
    weights = facts.weight_bytes
    if config.torch_device is not None:
        weights = 4 * sum(w.rows * w.cols for w in program.weights)
    if rules is not None:
        return ("weights but experts", dense_bytes(program, rules)), ("activations", activations)
    if config.expert_bytes is None:
        return ("weights", weights), ("activations", activations)
    experts = sum(program.weights[w].data.nbytes for w in expert_weights(program))
    if not experts:
        raise ModelError("expert_bytes: this model has no routed experts")
    kept = ("experts used last", min(config.expert_bytes, experts))
    return ("weights but experts", weights - experts), kept, ("activations", activations)


def block_bytes(config: EngineConfig, program: Program) -> int:
    """Bytes of one KV block: as kv_format says in the native executor, float32 in torch's."""
    cache = program.cache
    if config.torch_device is not None:
        token = 4 * cache.elements
    elif config.cache.kv_format == "int8":
        token = cache.elements + 4 * cache.elements // cache.head_dim
    else:
        token = 2 * cache.elements
    return token * config.cache.block_tokens


def _device_memory(config: EngineConfig) -> int:
    """Bytes free where the model will live."""
    device = config.torch_device
    if device is not None and device != "cpu":
        from ktransformers.engine.executors.torch import free_memory

        try:
            free = free_memory(device)
        except (AssertionError, RuntimeError) as error:  # torch's, for a device that it has not
            raise ModelError(f"executor: torch has no {device}: {str(error).partition(chr(10))[0]}") from None
        if free is not None:
            return free
    return machine.available_memory()


def _has_own_memory(config: EngineConfig) -> bool:
    """Whether the device has memory of its own, beside the machine's."""
    return config.torch_device not in (None, "cpu")


def _host_bytes(config: EngineConfig) -> int:
    """Bytes of the host tier. CannotFit for a size that the machine's memory has no room for."""
    wanted = config.cache.host_bytes
    if not _has_own_memory(config):
        # Beside a pool in the same memory it would keep nothing that a larger pool would not keep for less.
        return wanted or 0
    available = machine.available_memory()
    if wanted is None:
        return int(available * HOST_SHARE)
    if wanted > usable(available):
        raise CannotFit((("KV cache of the host", wanted),), available)
    return wanted


def _need_torch() -> None:
    """torch is no dependency of the CPU path: who asks for it without having it is told so."""
    missing = [name for name in ("torch", "gguf") if find_spec(name) is None]
    if missing:
        what = f"needs {' and '.join(missing)}: pip install 'ktransformers[torch]'"
        raise ModelError(f"executor: 'torch' {what}, or use the native executor")
