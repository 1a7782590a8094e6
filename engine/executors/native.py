"""The native executor: packs the weights, then hands the whole program to csrc; a step is one call."""

from collections.abc import Callable
from dataclasses import astuple, fields

import numpy as np

from ktransformers.engine import _kernels
from ktransformers.engine.batch import F32, MAX_LOGPROBS, U8, URGENT_TOKENS, Batch, Drawn, SamplingBatch
from ktransformers.engine.executors.node_ranges import Cut, cuts
from ktransformers.engine.program import LinearPart, Op, Pieces, Program, Tensor, WeightId, expert_weights
from ktransformers.engine.weights import pages
from ktransformers.kvcache.config import KvFormat


class NativeExecutor:
    """Runs a program on the CPU. A request's bits depend neither on its batch nor on chunking.

    `isa` is one of `_kernels.isas()`, None the best. With `expert_bytes` routed experts stay in the model's
    file, and that much memory holds those that were used last; at least what one layer has. `states`:
    places for states of sequences, of a program that has them. On a machine with several NUMA nodes routed
    experts are cut, a range of their hidden columns for each node; bits depend on how many ranges there are.
    `pretended_nodes`, at most as many as threads, are for tests. `progress` is told bytes of weights packed
    so far and in total. ValueError for a program that does not fit together
    (with op and field), MemoryError.
    """

    block_tokens: int = _kernels.BLOCK_TOKENS

    def __init__(
        self,
        program: Program,
        *,
        isa: str | None = None,
        threads: int,
        blocks: int,
        max_tokens: int,
        max_rows: int,
        expert_bytes: int | None = None,
        kv_format: KvFormat = "bf16",
        states: int = 0,
        pretended_nodes: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if program.cache.kind != "kv" and kv_format != "bf16":
            raise ValueError(f"kv_format: {kv_format!r} is not supported for latent rows")
        self.isa = isa or _kernels.isas()[0]
        self.blocks = blocks
        self.state_slots = states if program.state is not None else 0
        pool = _kernels.ThreadPool(threads, pretended_nodes)
        mapped = set() if expert_bytes is None else expert_weights(program)
        weights = pack_weights(pool, self.isa, program, mapped, progress)
        self.weights_digest = tuple(weight.digest(pool) for weight in weights)
        self._program: _kernels.Program | None = _kernels.Program(
            pool,
            self.isa,
            [_op_tuple(op) for op in program.ops],
            list(program.widths),
            weights,
            program.cache.layers,
            program.cache.kv_heads,
            program.cache.head_dim,
            blocks,
            max_tokens,
            max_rows,
            expert_bytes or 0,
            "latent" if program.cache.kind == "latent" else kv_format,
            None if program.state is None else astuple(program.state),
            self.state_slots,
        )
        # Experts in a file share one cache, which the step around would find changed.
        alone = bool(mapped) or program.state is not None
        self.urgent_tokens = 0 if alone else min(URGENT_TOKENS, max_tokens)
        self._within: _kernels.Program | None = None
        if self.urgent_tokens:
            rows = min(max_rows, self.urgent_tokens)
            self._within = self._program.within(self.urgent_tokens, rows)

    @property
    def block_bytes(self) -> int:
        return self._native().block_bytes

    def read_block(self, block: int, into: U8) -> None:
        """See engine.batch.Executor."""
        self._native().read_block(block, into)

    def write_block(self, block: int, data: U8) -> None:
        """See engine.batch.Executor."""
        self._native().write_block(block, data)

    def step(
        self, batch: Batch, sampling: SamplingBatch, between: Callable[[], None] | None = None
    ) -> Drawn:
        """See engine.batch.Executor. ValueError, with nothing done, for arrays that do not fit."""
        return _step(self._native(), batch, sampling, between)

    def urgent_step(self, batch: Batch, sampling: SamplingBatch) -> Drawn:
        """See engine.batch.Executor. Errors: as `step`, also for a block that the step around it writes."""
        if self._within is None:
            raise RuntimeError("there are no urgent steps here")
        return _step(self._within, batch, sampling, None)

    def logits(self, batch: Batch) -> F32:
        """The same step, but gives the logits [R, vocab]."""
        b = batch
        # fmt: off
        return self._native().logits(
            b.tokens, b.starts, b.context, b.block_starts, b.blocks, b.logit_rows,
            b.slots, b.keep_slots, b.keep_at,
        )
        # fmt: on

    def copy_state(self, source: int, target: int) -> None:
        """See engine.batch.Executor."""
        self._native().copy_state(source, target)

    def set_profiling(self, on: bool) -> None:
        """Count from now on what each op takes; ops that are fused otherwise then run each by itself."""
        self._native().set_profiling(on)

    def profile(self) -> list[tuple[int, float]]:
        """Calls and seconds of each op, then of the draw, since profiling was switched on."""
        return self._native().profile()

    def close(self) -> None:
        """Free weights, KV and threads. A later step raises RuntimeError."""
        self._program = self._within = None

    def _native(self) -> _kernels.Program:
        if self._program is None:
            raise RuntimeError("the executor is closed")
        return self._program


def _step(
    program: _kernels.Program, batch: Batch, sampling: SamplingBatch, between: Callable[[], None] | None
) -> Drawn:
    rows = len(batch.logit_rows)
    drawn = Drawn(
        token=np.empty(rows, np.int32),
        logprob=np.empty(rows, np.float32),
        top_tokens=np.empty((rows, MAX_LOGPROBS), np.int32),
        top_logprobs=np.empty((rows, MAX_LOGPROBS), np.float32),
    )
    b, s, d = batch, sampling, drawn
    # fmt: off
    program.step(
        b.tokens, b.starts, b.context, b.block_starts, b.blocks, b.logit_rows,
        b.slots, b.keep_slots, b.keep_at,
        s.temperature, s.top_k, s.top_p, s.min_p, s.repetition, s.presence, s.frequency,
        s.seed, s.position, s.logprobs, s.history_starts, s.history, s.history_output,
        s.bias_starts, s.bias_tokens, s.bias_values,
        d.token, d.logprob, d.top_tokens, d.top_logprobs, between,
    )
    # fmt: on
    return drawn


def pack_weights(
    pool: _kernels.ThreadPool,
    isa: str,
    program: Program,
    mapped: set[WeightId],
    progress: Callable[[int, int], None] | None,
) -> list[_kernels.Weight]:
    """Repack every tensor, in order, but those in `mapped`, which stay in their file. Pages of files are
    given back as soon as they are packed, so that a model is never twice in memory."""
    total = sum(t.data.nbytes for i, t in enumerate(program.weights) if i not in mapped)
    done = 0
    packed = []
    cut = cuts(program, pool.nodes)
    for i, t in enumerate(program.weights):
        if progress is not None:
            progress(done, total)
        try:
            packed.append(_map(isa, t) if i in mapped else pack(pool, isa, t, cut.get(i)))
        except ValueError as error:
            raise ValueError(f"tensor '{t.name}': {error}") from error
        done += 0 if i in mapped else t.data.nbytes
    if progress is not None:
        progress(done, total)
    return packed


def pack(pool: _kernels.ThreadPool, isa: str, t: Tensor, cut: Cut | None = None) -> _kernels.Weight:
    """Repack one tensor, and give its pages back. ValueError."""
    last: list[U8] = []

    def expert(e: int) -> U8:
        while last:
            pages.release(last.pop())
        last.append(t.expert(e))
        return last[0]

    if not isinstance(t.data, Pieces):
        pages.will_need(t.data)
    if t.experts == 1:
        last.append(t.read())
        weight = _kernels.pack(pool, isa, t.format, t.rows, t.cols, last[0])
    else:
        weight = _kernels.pack_experts(pool, isa, t.format, t.rows, t.cols, t.experts, expert, cut)
    pages.release(last.pop())
    return weight


def _map(isa: str, t: Tensor) -> _kernels.Weight:
    """Experts that stay in their file: as they are there, or read by `Pieces` when they are wanted."""
    if pages.mapped(t.expert(0)):
        data = [t.expert(e) for e in range(t.experts)]
        if all(pages.mapped(d) for d in data):
            return _kernels.map_experts(isa, t.format, t.rows, t.cols, data)
    if isinstance(t.data, Pieces) and len(t.data.read) == t.experts:
        return _kernels.make_experts(isa, t.format, t.rows, t.cols, t.experts, t.expert)
    raise ValueError("its file has not the experts one by one, so they cannot stay there")


def _op_tuple(op: Op) -> tuple[object, ...]:
    """(kind, fields in the order of their definition); parts of a Linear as tuples."""
    return (type(op).__name__, *(_field(getattr(op, f.name)) for f in fields(op)))


def _field(value: object) -> object:
    if isinstance(value, tuple):
        return [tuple(getattr(part, f.name) for f in fields(LinearPart)) for part in value]
    return value
