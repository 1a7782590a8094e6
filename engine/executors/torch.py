"""Runs a program with torch in float32 on dequantised weights: the tests' oracle, and a way to other devices.

It computes what the native executor computes, from the same ops, without sharing code with it. It is written
to be checked by eye, not to be fast: attention materialises its scores, one sequence at a time. Unlike the
native executor it does not promise that a token is independent of its batch to the last bit: torch may sum a
product in another order for another number of rows.
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import gguf
import numpy as np
import torch
import torch.nn.functional as F

from ktransformers.engine import _kernels
from ktransformers.engine.batch import F32, MAX_LOGPROBS, U8, Batch, Drawn, SamplingBatch
from ktransformers.engine.executors.torch_attention import Span, attention, mla_attention, softcap
from ktransformers.engine.executors.torch_experts import experts, product, route
from ktransformers.engine.executors.torch_recurrence import Run, States, delta_rule, short_conv
from ktransformers.engine.program import (
    Add,
    Attention,
    DeltaRule,
    Embed,
    Experts,
    Gated,
    GatherRows,
    HeadLinear,
    Linear,
    Logits,
    MlaAttention,
    Op,
    PositionScale,
    Program,
    RmsNorm,
    Rope,
    Route,
    ShortConv,
    Tensor,
    WeightId,
    expert_weights,
)
from ktransformers.engine.weights.dequantise import dequantise as dequantise_blocks
from ktransformers.engine.weights.formats import GGUF_FORMATS


def dequantise(tensor: Tensor) -> F32:
    """The weight in float32 [rows, cols], by the format's own package, or its definition."""
    raw = tensor.read().reshape(tensor.rows, -1)
    if tensor.format in GGUF_FORMATS:
        out = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(tensor.format))
    else:
        out = dequantise_blocks(raw, tensor.format)
    # A copy where it is still the file's own memory: torch wants to be able to write.
    return np.array(out, np.float32, copy=not out.flags.writeable).reshape(tensor.rows, tensor.cols)


_ACTS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu": F.silu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


class _Step:
    """A batch on the device, with what several ops need of it."""

    def __init__(self, batch: Batch, block_tokens: int, device: torch.device) -> None:
        self.tokens = torch.from_numpy(batch.tokens).long().to(device)
        self.logit_rows = torch.from_numpy(batch.logit_rows).long().to(device)
        self.spans: list[Span] = []
        self.runs: list[Run] = []
        self.positions = torch.empty(len(batch.tokens), dtype=torch.float64)
        for s, context in enumerate(batch.context.tolist()):
            begin, end = int(batch.starts[s]), int(batch.starts[s + 1])
            self.positions[begin:end] = torch.arange(context, context + end - begin)
            blocks = batch.blocks[batch.block_starts[s] : batch.block_starts[s + 1]].astype(np.int64)
            cells = (blocks[:, None] * block_tokens + np.arange(block_tokens)).reshape(-1)
            self.spans.append(Span(begin, end, torch.from_numpy(cells[: context + end - begin]).to(device)))
            if len(batch.slots) and end > begin:
                slot, keep = int(batch.slots[s]), int(batch.keep_slots[s])
                kept = begin + int(batch.keep_at[s]) - context
                self.runs.append(Run(begin, end, context == 0, slot, keep, kept))


def _check_states(batch: Batch, slots: int) -> None:
    """ValueError as the native executor."""
    sequences = len(batch.context) if slots else 0
    if any(len(a) != sequences for a in (batch.slots, batch.keep_slots, batch.keep_at)):
        raise ValueError(f"slots: not one for the state of each of {sequences} sequences")
    kept = batch.keep_slots != -1
    written = np.concatenate([batch.slots, batch.keep_slots[kept]])
    if len(written) and not 0 <= written.min() <= written.max() < slots:
        raise ValueError("slots: there is no such slot")
    if len(np.unique(written)) != len(written):
        raise ValueError("slots: a state is written twice")
    if sequences:
        after = (batch.keep_at - batch.context)[kept]
        if (after < 1).any() or (after > np.diff(batch.starts)[kept]).any():
            raise ValueError("keep_at: not reached by this step")


def _check(batch: Batch, vocab: int, blocks: int, block_tokens: int) -> None:
    """torch takes a negative index for one from the end: refuse what does not exist."""
    if len(batch.tokens) and not 0 <= batch.tokens.min() <= batch.tokens.max() < vocab:
        raise ValueError("tokens: outside the vocabulary")
    if len(batch.blocks) and not 0 <= batch.blocks.min() <= batch.blocks.max() < blocks:
        raise ValueError("blocks: outside the pool")
    rows = batch.logit_rows
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(batch.tokens):
        raise ValueError("logit_rows: outside the batch")
    lengths = np.diff(batch.starts)
    if (lengths < 0).any() or (batch.context < 0).any() or batch.starts[-1] != len(batch.tokens):
        raise ValueError("starts: not ranges of tokens")
    if (np.diff(batch.block_starts) * block_tokens < batch.context + lengths).any():
        raise ValueError("block_starts: a block table is shorter than its sequence")


class Elsewhere(Protocol):
    """Computes the routed experts for a TorchExecutor, some of them not on its device (see hybrid.py)."""

    digests: list[int]
    """Of the weights that it has; see Executor.weights_digest."""

    def experts(
        self, op: Experts, x: torch.Tensor, routed: torch.Tensor, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        """Begin; what is ready at once [rows, rows of down]."""
        ...

    def before(self, index: int, values: list[torch.Tensor]) -> None:
        """Op `index` comes next: add to the values what it must see of what was begun."""
        ...

    def after(self, tokens: int) -> None:
        """A step of so many tokens has been computed."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class TorchExecutor:
    """An engine.batch.Executor on a torch device."""

    def __init__(
        self,
        program: Program,
        *,
        blocks: int,
        block_tokens: int,
        max_tokens: int,
        device: str = "cpu",
        kv_dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        states: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
        dtypes: Sequence[torch.dtype] | None = None,
        elsewhere: "Elsewhere | None" = None,
    ) -> None:
        """Dequantise all weights to `device`, in `dtypes` (one each; float32); `progress` is told bytes of
        the file done and in total. `elsewhere` computes the routed experts, and has their weights.

        Keys and values are rounded to `kv_dtype` in the pool and read from there (bfloat16 is what the native
        executor does). `states`: places for states of sequences, of a program that has them.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.isa = f"torch-{device}"
        self.blocks = blocks
        self.block_tokens = block_tokens
        self.max_tokens = max_tokens
        self.urgent_tokens = 0
        self._device = torch.device(device)
        self._program = program
        self._elsewhere = elsewhere
        self._weights: list[torch.Tensor] = []
        self.weights_digest = self._load(dtypes, _kernels.ThreadPool(threads or 1), progress)
        c = program.cache
        cells = blocks * block_tokens
        # Zeroed, so that nothing of another process or an earlier model can be read from it.
        kv, latent = (c.layers, 2, cells, c.kv_heads, c.head_dim), (c.layers, cells, c.head_dim)
        shape = kv if c.kind == "kv" else latent
        self.state_slots = states if program.state is not None else 0
        if program.state is not None and states < 1:
            raise ValueError("states: must be positive")
        self._states = None if program.state is None else States(program.state, states, self._device)
        self._cell_axis = 2 if c.kind == "kv" else 1
        self._kv = torch.zeros(shape, dtype=kv_dtype, device=self._device)
        self.block_bytes = self._kv.nbytes // blocks
        self._values: list[torch.Tensor] = []
        self._angles: dict[WeightId, tuple[torch.Tensor, torch.Tensor]] = {}
        """cos and sin [T, 1, pairs] of this step's positions, for each set of frequencies."""

    def _load(
        self,
        dtypes: Sequence[torch.dtype] | None,
        pool: _kernels.ThreadPool,
        progress: Callable[[int, int], None],
    ) -> tuple[int, ...]:
        """Put all weights but those elsewhere on the device; digests of all."""
        program, elsewhere = self._program, self._elsewhere
        theirs = set() if elsewhere is None else expert_weights(program)
        digests = [] if elsewhere is None else list(elsewhere.digests)
        total = sum(w.data.nbytes for i, w in enumerate(program.weights) if i not in theirs)
        done = 0
        for i, weight in enumerate(program.weights):
            if i in theirs:
                self._weights.append(torch.empty(0))
                continue
            digests.append(_kernels.digest(pool, weight.read()))
            dtype = torch.float32 if dtypes is None else dtypes[i]
            self._weights.append(torch.from_numpy(dequantise(weight)).to(self._device, dtype))
            done += weight.data.nbytes
            progress(done, total)
        return tuple(digests)

    def logits(self, batch: Batch) -> F32:
        """One step; logits [R, vocab]. ValueError for a batch that names what does not exist."""
        out: F32 = self._run(batch).cpu().numpy()
        return out

    def urgent_step(self, batch: Batch, sampling: SamplingBatch) -> Drawn:
        """A step of a device is not interrupted."""
        raise RuntimeError("there are no urgent steps here")

    def step(
        self, batch: Batch, sampling: SamplingBatch, between: Callable[[], None] | None = None
    ) -> Drawn:
        """One step and its draws; `between` is not called. ValueError as `logits`."""
        logits = np.ascontiguousarray(self.logits(batch))
        rows = len(logits)
        drawn = Drawn(
            token=np.full(rows, -1, np.int32),
            logprob=np.zeros(rows, np.float32),
            top_tokens=np.full((rows, MAX_LOGPROBS), -1, np.int32),
            top_logprobs=np.zeros((rows, MAX_LOGPROBS), np.float32),
        )
        s = sampling
        _kernels.sample(
            logits,
            s.temperature, s.top_k, s.top_p, s.min_p, s.repetition, s.presence, s.frequency,
            s.seed, s.position, s.logprobs,
            s.history_starts, s.history, s.history_output,
            s.bias_starts, s.bias_tokens, s.bias_values,
            drawn.token, drawn.logprob, drawn.top_tokens, drawn.top_logprobs,
        )  # fmt: skip
        return drawn

    def read_block(self, block: int, into: U8) -> None:
        """See engine.batch.Executor."""
        kv = self._block(block)
        if into.nbytes != self.block_bytes:
            raise ValueError(f"into: {into.nbytes} bytes; a block has {self.block_bytes}")
        torch.from_numpy(into).view(kv.dtype).view(kv.shape).copy_(kv)

    def write_block(self, block: int, data: U8) -> None:
        """See engine.batch.Executor."""
        kv = self._block(block)
        if data.nbytes != self.block_bytes:
            raise ValueError(f"data: {data.nbytes} bytes; a block has {self.block_bytes}")
        kv.copy_(torch.from_numpy(data).view(kv.dtype).view(kv.shape))

    def copy_state(self, source: int, target: int) -> None:
        """See engine.batch.Executor."""
        if not (0 <= source < self.state_slots and 0 <= target < self.state_slots):
            raise ValueError("state: there is no such slot")
        self._live_states().copy(source, target)

    def _live_states(self) -> States:
        if self._states is None:
            raise RuntimeError("the executor is closed, or its program has no state")
        return self._states

    def _block(self, block: int) -> torch.Tensor:
        """The part of the pool that is one block: block_tokens cells of every layer."""
        if not 0 <= block < self.blocks:
            raise ValueError(f"block: {block} of {self.blocks}")
        begin = block * self.block_tokens
        return self._kv.narrow(self._cell_axis, begin, self.block_tokens)

    def close(self) -> None:
        """Free weights, KV and states."""
        if self._elsewhere is not None:
            self._elsewhere.close()
        self._weights = []
        self._kv = torch.zeros(0)
        self._states = None

    @torch.inference_mode()
    def _run(self, batch: Batch) -> torch.Tensor:
        _check(batch, self._program.vocab, self.blocks, self.block_tokens)
        _check_states(batch, self.state_slots)
        if len(batch.tokens) > self.max_tokens:
            raise ValueError(f"tokens: {len(batch.tokens)} in a step of at most {self.max_tokens}")
        step = _Step(batch, self.block_tokens, self._device)
        self._values = [torch.empty(0)] * len(self._program.widths)
        self._angles = {}
        for index, op in enumerate(self._program.ops):
            if self._elsewhere is not None:
                self._elsewhere.before(index, self._values)
            self._op(op, step)
        if self._elsewhere is not None:
            self._elsewhere.after(len(batch.tokens))
        out = self._values[_logits_of(self._program)]
        self._values = []
        return out

    def _op(self, op: Op, step: _Step) -> None:
        v, w = self._values, self._weights
        match op:
            case Embed():
                v[op.out] = w[op.table][step.tokens].float() * op.scale
            case RmsNorm():
                x = v[op.x].reshape(-1, self._program.widths[op.x] // op.group, op.group)
                x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + op.eps) * w[op.weight][0]
                v[op.out] = x.flatten(1)
            case Linear():
                for part in op.parts:
                    bias = None if part.bias is None else w[part.bias][0]
                    v[part.out] = product(v[op.x], w[part.weight], bias)
            case Rope():
                v[op.x] = self._rope(op, step)
            case PositionScale():
                spans = torch.floor((step.positions + 1) / op.span)
                v[op.x] = v[op.x] * (1 + op.scale * torch.log1p(spans)).float().to(self._device)[:, None]
            case HeadLinear():
                cols = w[op.weight].shape[1]
                weight = w[op.weight].reshape(op.heads, -1, cols)
                x = v[op.x].reshape(len(v[op.x]), op.heads, -1)[..., :cols]
                out = torch.einsum("thc,hrc->thr", x.to(weight.dtype), weight)
                v[op.out] = out.to(x.dtype).flatten(1)
            case Attention():
                sinks = None if op.sinks is None else w[op.sinks][0]
                kv = self._kv[op.layer]
                v[op.out] = attention(op, step.spans, kv, v[op.q], v[op.k], v[op.v], sinks)
            case MlaAttention():
                row = (v[op.latent], v[op.rope])
                v[op.out] = mla_attention(op, step.spans, self._kv[op.layer], v[op.q_latent], v[op.q], *row)
            case ShortConv():
                v[op.out] = short_conv(op, step.runs, self._live_states(), v[op.x], w[op.weight])
            case DeltaRule():
                gates = w[op.decay] * F.softplus(v[op.a] + w[op.bias])
                states, beta = self._live_states(), v[op.b].sigmoid()
                v[op.out] = delta_rule(op, step.runs, states, v[op.qkv], gates, beta)
            case Gated():
                v[op.out] = _ACTS[op.act](v[op.gate]) * v[op.up]
            case Route():
                v[op.out] = route(op, v[op.logits], None if op.bias is None else w[op.bias][0])
            case Experts() if self._elsewhere is not None:
                v[op.out] = self._elsewhere.experts(op, v[op.x], v[op.route], step.logit_rows)
            case Experts():
                v[op.out] = experts(op, v[op.x], v[op.route], w)
            case Add():
                v[op.out] = v[op.a] + v[op.b]
            case GatherRows():
                v[op.out] = v[op.x][step.logit_rows]
            case Logits():
                v[op.out] = softcap(product(v[op.x], w[op.weight], None), op.softcap)

    def _rope(self, op: Rope, step: _Step) -> torch.Tensor:
        if op.inv_freq not in self._angles:
            # In float64: at position 100,000 a float32 angle is wrong by 0.004.
            angles = step.positions[:, None] * self._weights[op.inv_freq][0].cpu().double()
            cos, sin = (f(angles).float().to(self._device)[:, None, :] for f in (torch.cos, torch.sin))
            self._angles[op.inv_freq] = (cos, sin)
        cos, sin = self._angles[op.inv_freq]
        n = cos.shape[-1]
        x = self._values[op.x].reshape(-1, op.heads, op.head_dim)
        before, turned, after = x.tensor_split((op.offset, op.offset + 2 * n), -1)
        if op.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned[..., :n], turned[..., n:]
        a, b = (a * cos - b * sin) * op.scale, (a * sin + b * cos) * op.scale
        turned = torch.stack((a, b), -1).flatten(-2) if op.interleaved else torch.cat((a, b), -1)
        return torch.cat((before, turned, after), -1).flatten(1)


def _logits_of(program: Program) -> int:
    last = program.ops[-1]
    if not isinstance(last, Logits):
        raise ValueError("ops: the last is not Logits")
    return last.out


def free_memory(device: str) -> int | None:
    """Free bytes of a device's own memory; None when it shares the machine's or does not say."""
    if torch.device(device).type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free
