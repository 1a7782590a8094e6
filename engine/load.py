"""From a model file to a running executor: what the file holds, what fits in memory, what runs it."""

import hashlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from ktransformers.engine import machine
from ktransformers.engine.batch import URGENT_TOKENS, Executor
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.models.decoder import compile_program
from ktransformers.engine.models.folder import FolderModel, open_folder
from ktransformers.engine.models.registry import read_spec
from ktransformers.engine.models.spec import ModelError, ModelSpec
from ktransformers.engine.placement.place import Placement, dense_bytes, experts_name, experts_ops, place
from ktransformers.engine.placement.rules import PlacementError, Rules, read_rules
from ktransformers.engine.placement.statistics import HALF_LIFE, ExpertStatistics
from ktransformers.engine.program import Logits, Program, expert_weights
from ktransformers.engine.requantise import Errors, requantise
from ktransformers.engine.weights.gguf import GgufFile, read
from ktransformers.engine.weights.safetensors import Folder

Progress = Callable[[int, int], None]
"""Told bytes of weights done, and in total."""

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
class Facts:
    """What is known of a model before it is loaded."""

    name: str
    """general.name, or the name of the file or folder."""
    spec: ModelSpec
    weight_bytes: int
    """Of the tensors that the program reads, in the formats that they are loaded in."""
    identity: bytes
    """What its files say it is, without the weights' contents."""
    requantised: Errors | None
    """What experts lose to expert_format, known once they are loaded."""


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
    hybrid: "Hybrid | None" = None
    """None: the executor has all of the model."""


@dataclass(frozen=True)
class Hybrid:
    """Experts on two sides."""

    placement: Placement
    statistics: ExpertStatistics
    statistics_file: Path | None
    model: str
    """Identity of its files, in hexadecimal."""


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


def open_model(config: EngineConfig) -> tuple[Program, Facts]:
    """Read and check a model's file, or its folder in Hugging Face's layout; takes milliseconds, as weights
    are only mapped.

    GgufError and FolderError for broken files, ModelError for a model that is not supported; all name the
    file.
    """
    path = Path(config.model)
    file: GgufFile | FolderModel
    files: GgufFile | Folder
    try:
        if path.is_dir():
            file = open_folder(path)
            spec, files, name = file.spec, file.folder, path.resolve().name
        else:
            file = files = read(path)
            spec, name = read_spec(file.metadata), _general_name(file)
        program, requantised = requantise(
            compile_program(spec, file), config.expert_format, config.threads or machine.cpus()
        )
    except ModelError as e:
        raise ModelError(f"{config.model}: {e}") from None
    facts = Facts(
        name=name,
        spec=spec,
        weight_bytes=sum(w.data.nbytes for w in program.weights),
        identity=identity(files),
        requantised=requantised,
    )
    return program, facts


def _general_name(file: GgufFile) -> str:
    name = file.metadata.get("general.name")
    return name if isinstance(name, str) and name else file.path.stem


def identity(file: GgufFile | Folder) -> bytes:
    """SHA-256 of the header and size of each file: configuration, tokenizer, names and shapes."""
    digest = hashlib.sha256()
    for shard, header in zip(file.shards, file.header_bytes, strict=True):
        digest.update(len(shard).to_bytes(8, "little"))
        digest.update(shard[:header].data)
    return digest.digest()


def fingerprint(config: EngineConfig, program: Program, facts: Facts, executor: Executor) -> bytes:
    """SHA-256 of everything that changes the bytes of KV; see engine.protocol.Ready.

    What the model is, what it was compiled to and the contents of all its weights; the KV's format and
    blocks; and the code that computes it: two instruction sets, or two builds, need not agree to the last
    bit, and a hit has to.
    Weights are digested once they are in memory, which takes a small part of the time of loading them: a few
    samples would not tell a model from its fine-tune when that has changed some of its tensors only.
    """
    digest = hashlib.sha256()
    for part in (
        facts.identity,
        repr(program.ops).encode(),
        repr(executor.weights_digest).encode(),
        f"{executor.isa} {executor.block_tokens} {executor.block_bytes}".encode(),
        _build(config),
    ):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _build(config: EngineConfig) -> bytes:
    """Names the code that computes KV."""
    torch = f"torch {version('torch')}".encode() if config.torch_device is not None else b""
    if torch and not config.placement:
        return torch
    from ktransformers.engine import _kernels

    return torch + hashlib.sha256(Path(_kernels.__file__).read_bytes()).digest()


def plan(config: EngineConfig, program: Program, facts: Facts, available: int | None = None) -> Plan:
    """Size the KV pool and cap the context. ModelError when the settings do not go together, CannotFit.

    A pool with no size given holds what `max_sequences` full sequences need, within the free memory.
    """
    if available is None:
        available = device_memory(config)
    rules = placement_rules(config)
    machine_memory = machine.available_memory() if _has_own_memory(config) else available
    limit = None if rules is None else rules.memory_bytes
    if rules is not None and limit is not None:
        if limit > available:
            raise PlacementError(f"{rules.where}: memory_bytes {limit}: the device has {available} free")
        available = limit
    free = usable(available) if limit is None else limit
    hybrid = None if rules is None else _open_placement(config, program, facts, rules)
    if hybrid is not None and limit is None and not _has_own_memory(config):
        # The same memory holds what the CPU keeps: enough of it for all experts stays free of the device's.
        free -= hybrid.placement.all_cpu_bytes
    trained = facts.spec.context
    wanted = trained if config.context is None else config.context
    if wanted > trained:
        raise ModelError(f"context: {wanted} is longer than the {trained} tokens this model was trained for")
    size = config.cache.block_tokens
    block = block_bytes(config, program)
    host_blocks = _host_bytes(config) // block if program.state is None else 0
    states = _states(config, program)
    needs = _fixed_needs(config, program, facts, rules)
    if program.state is not None:
        needs = (*needs, (f"states, {states}", states * 4 * program.state.elements))
    if host_blocks and not _has_own_memory(config):
        needs = (*needs, (f"KV cache of the host, {host_blocks} blocks", host_blocks * block))
    fixed = sum(n for _, n in needs)
    # A context that was asked for must fit whole.
    least = -(-(wanted if config.context is not None else min(wanted, SMALLEST_CONTEXT)) // size)
    if config.cache.device_bytes is not None:
        blocks = config.cache.device_bytes // block
        if blocks < least:
            what = f"{config.cache.device_bytes} bytes are {blocks} blocks of {block} bytes"
            raise ModelError(f"cache.device_bytes: {what}; one sequence needs {least}")
        room = available - fixed
    else:
        # What rules put on the device is not for the pool to take.
        room = free - fixed - (0 if hybrid is None else hybrid.placement.fixed_device_bytes)
        useful = config.max_sequences * -(-wanted // size)
        blocks = max(min(useful, int(available * POOL_SHARE) // block, room // block), least)
    needs = (*needs, (f"KV cache, {blocks} blocks", blocks * block))
    if blocks * block > room:
        cpu = usable(available) - free if limit is None else 0
        raise CannotFit((*needs, *((("experts on the cpu", cpu),) if cpu else ())), available, limit)
    if rules is not None and hybrid is not None:
        left = free - sum(n for _, n in needs)
        hybrid = replace(hybrid, placement=place(program, rules, left, hybrid.statistics))
        needs = (*needs, *_expert_needs(config, hybrid.placement, needs, machine_memory))
    return Plan(
        threads=config.threads or machine.cpus(),
        blocks=blocks,
        block_bytes=block,
        host_blocks=host_blocks,
        states=states,
        max_len=min(wanted, blocks * size),
        needs=needs,
        available=available,
        hybrid=hybrid,
    )


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


def placement_rules(config: EngineConfig) -> Rules | None:
    """What the setting `placement` says; None when there is none. PlacementError."""
    if not config.placement:
        return None
    if config.torch_device is None:
        raise PlacementError(
            "placement: the native executor has all of the model on the CPU: set executor to the device of "
            "attention, such as 'torch:cuda', or leave placement out"
        )
    if config.expert_bytes is not None:
        raise PlacementError("placement: not together with expert_bytes: experts on the cpu are in memory")
    _need_torch()
    from ktransformers.engine import _kernels

    return read_rules(config.placement, tuple(_kernels.isas()))


def _open_placement(config: EngineConfig, program: Program, facts: Facts, rules: Rules) -> Hybrid:
    """What is known of experts, and the placement with room for all of them."""
    names = {experts_name(program, op): op.experts for _, op in experts_ops(program)}
    half_life = HALF_LIFE if rules.policy == "adaptive" else math.inf
    statistics, model = ExpertStatistics(names, half_life), facts.identity.hex()
    file = rules.statistics
    if file is None and config.cache.cache_dir:
        folder = Path(config.cache.cache_dir)
        file = folder.with_name(f"{folder.name}-experts") / f"{model}.json"
    if file is not None:
        statistics.load(file, model)
    return Hybrid(place(program, rules, sys.maxsize, statistics), statistics, file, model)


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


def device_memory(config: EngineConfig) -> int:
    """Bytes free where the model will live."""
    device = config.torch_device
    if device is not None and device != "cpu":
        _need_torch()
        from ktransformers.engine.executors.torch import free_memory

        free = free_memory(device)
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


def _build_hybrid(
    config: EngineConfig, device: str, program: Program, plan: Plan, hybrid: Hybrid, progress: Progress
) -> Executor:
    from ktransformers.engine.executors.hybrid import Records, hybrid_executor

    try:
        return hybrid_executor(
            program,
            hybrid.placement,
            Records(hybrid.statistics, hybrid.statistics_file, hybrid.model),
            device=device,
            threads=plan.threads,
            blocks=plan.blocks,
            block_tokens=config.cache.block_tokens,
            max_tokens=config.max_batch_tokens,
            states=plan.states,
            progress=progress,
        )
    except ValueError as e:
        raise ModelError(f"{config.model}: it cannot be placed so: {e}") from e


def build_executor(config: EngineConfig, program: Program, plan: Plan, progress: Progress) -> Executor:
    """Load the weights. ModelError for settings that this executor cannot honour."""
    if config.torch_device is not None:
        _need_torch()
        if config.cache.kv_format != "f16":
            raise ModelError(f"cache.kv_format: only the native executor has {config.cache.kv_format!r}")
        if config.expert_bytes is not None:
            raise ModelError("expert_bytes: only the native executor can leave experts on disk")
        if plan.hybrid is not None:
            return _build_hybrid(config, config.torch_device, program, plan, plan.hybrid, progress)
        from ktransformers.engine.executors.torch import TorchExecutor

        return TorchExecutor(
            program,
            device=config.torch_device,
            threads=plan.threads,
            blocks=plan.blocks,
            block_tokens=config.cache.block_tokens,
            max_tokens=config.max_batch_tokens,
            states=plan.states,
            progress=progress,
        )
    from ktransformers.engine import _kernels
    from ktransformers.engine.executors.native import NativeExecutor

    if config.cache.block_tokens != _kernels.BLOCK_TOKENS:
        what = f"the native executor has blocks of {_kernels.BLOCK_TOKENS} tokens"
        raise ModelError(f"cache.block_tokens: {config.cache.block_tokens} is not supported; {what}")
    try:
        return NativeExecutor(
            program,
            threads=plan.threads,
            blocks=plan.blocks,
            max_tokens=config.max_batch_tokens,
            max_rows=config.max_sequences,
            expert_bytes=config.expert_bytes,
            kv_format=config.cache.kv_format,
            states=plan.states,
            progress=progress,
        )
    except ValueError as e:
        raise ModelError(f"{config.model}: the native executor cannot run it: {e}") from e
