"""A model compiled to a flat list of ops over numbered values: the one thing that executors run.

Values are two-dimensional float32, one row for each token of the batch (after GatherRows: for each row that
needs logits); `Program.widths[v]` is the row length of value v. Weights are named tensors in the format of
their file, `[rows, cols]` with one output in each row. Ops run in order; a later op sees what an earlier
one wrote. An architecture adds no code to executors as long as its mathematics is here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

ValueId = int
WeightId = int


U8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Pieces:
    """Bytes of a weight that lie in several places, or that are put together when they are asked for: what a
    checkpoint in the format of Hugging Face has of experts and of quantised weights."""

    nbytes: int
    """Of all pieces."""
    read: tuple[Callable[[], U8], ...]
    """Each gives the same number of rows; they follow each other. May be called from any thread."""


@dataclass(frozen=True)
class Tensor:
    """A weight as its file has it: `rows` x `cols` elements in a `format` (weights.formats).

    Weights of `experts` experts lie end to end: those of expert e begin at row e * (rows // experts).
    """

    name: str
    format: int
    rows: int
    cols: int
    data: U8 | Pieces
    experts: int = 1

    def read(self) -> U8:
        """The raw bytes [nbytes] of the whole: a view of the file where it has them so."""
        if not isinstance(self.data, Pieces):
            return self.data.reshape(-1)
        pieces = [read() for read in self.data.read]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def expert(self, expert: int) -> U8:
        """The raw bytes of one expert."""
        if isinstance(self.data, Pieces) and len(self.data.read) == self.experts:
            return self.data.read[expert]()
        one: U8 = self.read().reshape(self.experts, -1)[expert]
        return one


@dataclass(frozen=True)
class Embed:
    """out[t] = scale * table[token[t]]"""

    table: WeightId
    out: ValueId
    scale: float


@dataclass(frozen=True)
class RmsNorm:
    """Each slice of `group` elements of a row: x / sqrt(mean(x^2) + eps) * weight (out may be x).

    The weight is F32 [1, group].
    """

    x: ValueId
    weight: WeightId
    out: ValueId
    group: int
    eps: float


@dataclass(frozen=True)
class LinearPart:
    """out = x @ weight.T + bias; bias is F32 [1, rows] or None."""

    weight: WeightId
    bias: WeightId | None
    out: ValueId


@dataclass(frozen=True)
class Linear:
    """One or more products of the same input (q, k and v; gate and up), so that it is quantised once."""

    x: ValueId
    parts: tuple[LinearPart, ...]


@dataclass(frozen=True)
class Rope:
    """In place: rotate the first `2 * len(inv_freq)` elements of each head by position * inv_freq, times
    `scale`.

    Pairs are (i, i + n) with n = len(inv_freq) ("neox"), or (2i, 2i + 1) when `interleaved`. inv_freq is
    F32 [1, n], any context extension already in it.
    """

    x: ValueId
    heads: int
    head_dim: int
    inv_freq: WeightId
    interleaved: bool
    scale: float


@dataclass(frozen=True)
class Attention:
    """Write k and v of this step to the cache of `layer`, then causal attention of q over all positions so
    far.

    q head h reads kv head h // (heads // kv_heads). Scores are `scale * q.k`, then softcap * tanh(s /
    softcap) when softcap > 0; with window > 0 position p sees (p - window, p]. Folded in tiles aligned to
    absolute positions.
    """

    q: ValueId
    k: ValueId
    v: ValueId
    out: ValueId
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float


@dataclass(frozen=True)
class Gated:
    """out = act(gate) * up (out may be gate)"""

    gate: ValueId
    up: ValueId
    out: ValueId
    act: Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Add:
    """out = a + b (out may be a)"""

    a: ValueId
    b: ValueId
    out: ValueId


@dataclass(frozen=True)
class GatherRows:
    """out[i] = x[logit_rows[i]]: from here on only the rows that need logits are computed."""

    x: ValueId
    out: ValueId


@dataclass(frozen=True)
class Logits:
    """out = x @ weight.T, then softcap * tanh(l / softcap) when softcap > 0. The last op."""

    x: ValueId
    weight: WeightId
    out: ValueId
    softcap: float


Op = Embed | RmsNorm | Linear | Rope | Attention | Gated | Add | GatherRows | Logits


@dataclass(frozen=True)
class CacheShape:
    """KV of one token: `layers` times keys and values of `kv_heads` x `head_dim`."""

    layers: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Program:
    """The ops of one model, with what they read."""

    ops: tuple[Op, ...]
    widths: tuple[int, ...]
    weights: tuple[Tensor, ...]
    cache: CacheShape
    vocab: int
