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
    """One or more products of the same input (q, k and v; gate and up), so that it is quantised once.

    `precise` asks an executor that rounds inputs to eight bits for more of them where single elements stand
    far out of their neighbours. The result is defined without it.
    """

    x: ValueId
    parts: tuple[LinearPart, ...]
    precise: bool = False


@dataclass(frozen=True)
class Rope:
    """In place: rotate `2 * len(inv_freq)` elements of each head, from element `offset` on, by position *
    inv_freq, times `scale`.

    Pairs are (i, i + n) with n = len(inv_freq) ("neox"), or (2i, 2i + 1) when `interleaved`. inv_freq is
    F32 [1, n], any context extension already in it.
    """

    x: ValueId
    heads: int
    head_dim: int
    inv_freq: WeightId
    interleaved: bool
    scale: float
    offset: int = 0


@dataclass(frozen=True)
class PositionScale:
    """In place: x[t] *= 1 + scale * log(1 + floor((position + 1) / span)), the attention temperature of
    Llama 4's queries without rope."""

    x: ValueId
    span: int
    scale: float


@dataclass(frozen=True)
class HeadLinear:
    """A product for each head: out head h = weight of head h @ the first `cols` elements of x's head h.

    weight is [heads * rows, cols] (a tensor of `heads` experts); out has width heads * rows; x's heads are
    widths[x] // heads >= cols elements apart. Multi-head latent attention folds its up-projections of keys
    and values into queries and outputs by this (DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434, 2.1.2).
    """

    x: ValueId
    weight: WeightId
    out: ValueId
    heads: int


@dataclass(frozen=True)
class Attention:
    """Write k and v of this step to the cache of `layer`, then causal attention of q over all positions so
    far.

    q head h reads kv head h // (heads // kv_heads). Scores are `scale * q.k`, then softcap * tanh(s /
    softcap) when softcap > 0; with window > 0 position p sees (p - window, p], with chunk > 0 it sees
    [p - p % chunk, p]. `sinks` is F32 [1, heads]: one more score of each head in the softmax's sum, without
    a value. Folded in tiles aligned to absolute positions.
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
    sinks: WeightId | None = None
    chunk: int = 0


@dataclass(frozen=True)
class MlaAttention:
    """Attention of all heads over one latent row for each position, written to the cache of `layer` first.

    The row is latent (L = widths[latent] elements, normed), then rope (R = widths[rope], rotated). The query
    of head h is q_latent's head h (L elements), then the last R elements of q's head h. Scores are `scale *
    query.row`; the output of a head [L] is the weighted sum of the rows' latent parts. Folded as Attention.
    """

    q_latent: ValueId
    q: ValueId
    latent: ValueId
    rope: ValueId
    out: ValueId
    layer: int
    heads: int
    scale: float


@dataclass(frozen=True)
class ShortConv:
    """A causal convolution over the tokens of a sequence, each column by itself, then silu.

    out[t][c] = silu(sum over j of weight[j][c] * x[t - taps + 1 + j][c]), with 0 for what lies before the
    sequence. weight is F32 [taps, width]; x and out have that width and are not the same. The last taps - 1
    rows of x are part of the sequence's state in `layer`.
    """

    x: ValueId
    weight: WeightId
    out: ValueId
    layer: int


@dataclass(frozen=True)
class DeltaRule:
    """The gated delta rule (Yang et al. 2024, https://arxiv.org/abs/2412.06464), one token after another.

    A row of qkv is k_heads queries of k_dim, as many keys, then v_heads values v of v_dim; value head h has
    query and key of head h // (v_heads // k_heads), each divided by sqrt(its sum of squares + 1e-6), and the
    query also by sqrt(k_dim). The state S [k_dim, v_dim] of a head, part of the sequence's state in `layer`,
    becomes with each token

        S <- exp(decay * softplus(a + bias)) S
        S <- S + k outer sigmoid(b) (v - S^T k)
        out = S^T q

    a and b are values with an element for each value head, decay and bias F32 [1, v_heads]. qkv, a and b are
    used up: what they hold afterwards is not defined.
    """

    qkv: ValueId
    a: ValueId
    b: ValueId
    decay: WeightId
    bias: WeightId
    out: ValueId
    layer: int
    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int


@dataclass(frozen=True)
class Gated:
    """out = act(gate) * up (out may be gate). "sigmoid" is the gate of a gated output: its gate may be one
    element for the whole row of up (then out is not gate)."""

    gate: ValueId
    up: ValueId
    out: ValueId
    act: Literal["silu", "gelu_tanh", "sigmoid"]


@dataclass(frozen=True)
class Route:
    """Choose `top` of `experts` experts for each row, from the router's logits [experts].

    1. p = softmax(logits), sigmoid(logits), or the logits themselves for "softmax_top".
    2. c = p + bias (F32 [1, experts], of DeepSeek-V3's balancing) or p: what is chosen by.
    3. With groups > 1, experts are `groups` groups of neighbours; the score of a group is the largest c in it
       ("max") or the sum of its two largest ("top2"). Only experts of the best `top_groups` groups remain.
    4. The `top` largest c are chosen, largest first. Of equals (groups, too) the lower number comes first;
       NaN counts as -infinity, so that the choice is `top` different experts whatever the logits.
    5. The weight of a chosen expert is its p (without bias); for "softmax_top" the softmax of p over the
       chosen. Then, if `normalise`, divided by (their sum + 1e-20). Then times `scale`.

    out has width 2 * top: the experts' numbers (as float32, exact), then their weights.
    """

    logits: ValueId
    bias: WeightId | None
    out: ValueId
    experts: int
    top: int
    score: Literal["softmax", "sigmoid", "softmax_top"]
    groups: int
    top_groups: int
    group_score: Literal["max", "top2"]
    normalise: bool
    scale: float


@dataclass(frozen=True)
class Experts:
    """The chosen experts' gated MLPs: out = sum over i in the route's order of w[i] * mlp of expert e[i] (x).

    mlp(x) = down @ a(gate @ x + gate_bias, up @ x + up_bias) + down_bias, where a(g, u) is act(g) * u, and
    for "swiglu_oai" g' * sigmoid(alpha * g') * (u' + 1) with g' = min(g, limit) and u' = u clamped to
    [-limit, limit]. If `weigh_input`, x is multiplied by the weight instead of the result. `route` is the
    out of a Route. gate and up are tensors of `experts` experts of F x widths[x], down of widths[out] x F;
    biases are F32 [experts, rows of an expert]. out is neither x nor route.
    """

    x: ValueId
    route: ValueId
    out: ValueId
    gate: WeightId
    up: WeightId
    down: WeightId
    gate_bias: WeightId | None
    up_bias: WeightId | None
    down_bias: WeightId | None
    experts: int
    top: int
    act: Literal["silu", "gelu_tanh", "relu", "swiglu_oai"]
    alpha: float
    limit: float
    weigh_input: bool


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
    """out = x @ weight.T, then softcap * tanh(l / softcap) when softcap > 0. The last op.

    `precise` as Linear's.
    """

    x: ValueId
    weight: WeightId
    out: ValueId
    softcap: float
    precise: bool = False


Op = (
    Embed
    | RmsNorm
    | Linear
    | HeadLinear
    | Rope
    | PositionScale
    | Attention
    | MlaAttention
    | ShortConv
    | DeltaRule
    | Gated
    | Route
    | Experts
    | Add
    | GatherRows
    | Logits
)


@dataclass(frozen=True)
class CacheShape:
    """What one token leaves in the cache, for each of `layers` layers of attention.

    "kv": keys and values of `kv_heads` x `head_dim`. "latent": one row of `head_dim` elements, which all
    heads read as key and, in its first part, as value (kv_heads is 1).
    """

    layers: int
    kv_heads: int
    head_dim: int
    kind: Literal["kv", "latent"] = "kv"

    @property
    def elements(self) -> int:
        """Of one token, all layers."""
        return self.layers * self.kv_heads * self.head_dim * (2 if self.kind == "kv" else 1)


@dataclass(frozen=True)
class StateShape:
    """What a sequence has beside its KV, whatever its length, in each of `layers` layers: `tail` rows of
    `conv` elements (ShortConv), and `heads` matrices of k_dim x v_dim (DeltaRule). All of it float32."""

    layers: int
    tail: int
    conv: int
    heads: int
    k_dim: int
    v_dim: int

    @property
    def elements(self) -> int:
        """Of one sequence, all layers."""
        return self.layers * (self.tail * self.conv + self.heads * self.k_dim * self.v_dim)


@dataclass(frozen=True)
class Program:
    """The ops of one model, with what they read."""

    ops: tuple[Op, ...]
    widths: tuple[int, ...]
    weights: tuple[Tensor, ...]
    cache: CacheShape
    vocab: int
    state: StateShape | None = None
    """None: a sequence is its tokens and their KV."""


def expert_weights(program: Program) -> set[WeightId]:
    """The weights of routed experts: gate, up and down of each layer that has them."""
    return {w for op in program.ops if isinstance(op, Experts) for w in (op.gate, op.up, op.down)}
