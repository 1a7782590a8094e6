"""Small programs built by hand, and batches for them."""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ktransformers.engine.batch import Batch, SamplingBatch
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.program import (
    Attention,
    CacheShape,
    Embed,
    GatherRows,
    Logits,
    Program,
    Tensor,
)

BT = 16
F32 = npt.NDArray[np.float32]


def tensor(values: npt.ArrayLike, name: str = "w") -> Tensor:
    a = np.atleast_2d(np.ascontiguousarray(values, np.float32))
    return Tensor(name, 0, a.shape[0], a.shape[1], a.reshape(-1).view(np.uint8))


def executor(program: Program, isa: str | None = None, threads: int = 1, **settings: Any) -> NativeExecutor:
    settings = {"blocks": 64, "max_tokens": 256, "max_rows": 256} | settings
    return NativeExecutor(program, isa=isa, threads=threads, **settings)


@dataclass(frozen=True)
class Part:
    """What a step computes of one sequence; a logit row for each token unless `rows` says which."""

    tokens: list[int]
    context: int
    blocks: list[int]
    rows: list[int] | None = None


def batch(*parts: Part) -> Batch:
    starts = np.cumsum([0, *(len(p.tokens) for p in parts)])
    rows = [
        starts[i] + r
        for i, p in enumerate(parts)
        for r in (range(len(p.tokens)) if p.rows is None else p.rows)
    ]
    return Batch(
        tokens=np.array([t for p in parts for t in p.tokens], np.int32),
        starts=starts.astype(np.int32),
        context=np.array([p.context for p in parts], np.int32),
        block_starts=np.cumsum([0, *(len(p.blocks) for p in parts)]).astype(np.int32),
        blocks=np.array([b for p in parts for b in p.blocks], np.int32),
        logit_rows=np.array(rows, np.int32),
    )


def chunked(ex: NativeExecutor, tokens: list[int], blocks: list[int], chunk: int) -> F32:
    """Logits of every position, computed `chunk` tokens a step."""
    steps = [
        ex.logits(batch(Part(tokens[i : i + chunk], i, blocks[: -(-min(i + chunk, len(tokens)) // BT)])))
        for i in range(0, len(tokens), chunk)
    ]
    return np.concatenate(steps)


@dataclass(frozen=True)
class AttentionShape:
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    softcap: float = 0.0
    scale: float = 0.3

    @property
    def vocab(self) -> int:
        return self.heads * self.head_dim


def attention_program(shape: AttentionShape, q: F32, k: F32, v: F32) -> Program:
    """Token t has query q[t], key k[t], value v[t]; the logits are what attention gives."""
    s = shape
    width, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return Program(
        ops=(
            Embed(0, 0, 1.0),
            Embed(1, 1, 1.0),
            Embed(2, 2, 1.0),
            Attention(0, 1, 2, 3, 0, s.heads, s.kv_heads, s.head_dim, s.scale, s.window, s.softcap),
            GatherRows(3, 4),
            Logits(4, 3, 5, 0.0),
        ),
        widths=(width, kv, kv, width, width, width),
        weights=(tensor(q), tensor(k), tensor(v), tensor(np.eye(width))),
        cache=CacheShape(1, s.kv_heads, s.head_dim),
        vocab=s.vocab,
    )


def sampling(rows: int, **changes: Any) -> SamplingBatch:
    """`rows` draws that change nothing; every change is a scalar or an array of its field's type."""
    types = {
        "seed": np.int64,
        "position": np.int64,
        "top_k": np.int32,
        "logprobs": np.int32,
        "history_output": np.int32,
    }
    ragged = {
        "history_starts": np.zeros(rows + 1, np.int32),
        "history": np.zeros(0, np.int32),
        "bias_starts": np.zeros(rows + 1, np.int32),
        "bias_tokens": np.zeros(0, np.int32),
        "bias_values": np.zeros(0, np.float32),
    }
    start = {"temperature": 1.0, "top_p": 1.0, "repetition": 1.0, "logprobs": -1}
    arrays: dict[str, Any] = {
        f.name: np.full(rows, start.get(f.name, 0), types.get(f.name, np.float32))
        for f in fields(SamplingBatch)
        if f.name not in ragged
    }
    plain = SamplingBatch(**arrays, **ragged)
    typed = {name: np.broadcast_to(np.asarray(x, getattr(plain, name).dtype), np.shape(x) or (rows,)).copy()
             for name, x in changes.items()}  # fmt: skip
    return replace(plain, **typed)
