"""What the decoder needs to know about a model: sizes, and which of the family's variations it has."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt


class ModelError(ValueError):
    """The file is well formed, but not a model that can be run. One line that says what is wrong."""


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension (Peng et al. 2023, https://arxiv.org/abs/2309.00071, section 3)."""

    factor: float
    original_context: int
    attention_factor: float
    """By which rotated elements are multiplied; see `sharpening`."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether the pairs between which frequencies go over from one rule to the other are whole numbers."""


def sharpening(factor: float, strength: float = 1.0) -> float:
    """YaRN sharpens attention as the context grows by `factor`."""
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding of the first `dims` elements of each head.

    `interleaved`: pairs are neighbours (llama's permuted weights), else element i goes with i + dims / 2.
    Frequencies are divided by `factor` (linear scaling), or stretched by `yarn`.
    """

    base: float
    dims: int
    interleaved: bool
    factor: float = 1.0
    yarn: Yarn | None = None

    def inv_freq(self, divisors: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """Radians per position [dims / 2]; `divisors` [dims / 2] are a file's own factors (llama 3.1)."""
        n = self.dims // 2
        freq = self.base ** (-np.arange(n, dtype=np.float64) / n)
        if self.yarn is not None:
            freq *= self._yarn_stretch(self.yarn, n)
        freq /= self.factor
        if divisors is not None:
            freq /= divisors
        return freq.astype(np.float32)

    def _yarn_stretch(self, yarn: Yarn, n: int) -> npt.NDArray[np.float64]:
        """1 for pairs that turn beta_fast times in the original context, 1 / factor for beta_slow."""

        def pair_that_turns(times: float) -> float:
            return n * math.log(yarn.original_context / (times * 2 * math.pi)) / math.log(self.base)

        first, last = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
        if yarn.truncate:
            first, last = math.floor(first), math.ceil(last)
        low, high = max(first, 0), min(last, 2 * n - 1)
        ramp = np.clip((np.arange(n, dtype=np.float64) - low) / max(high - low, 0.001), 0.0, 1.0)
        stretch: npt.NDArray[np.float64] = ramp / yarn.factor + (1.0 - ramp)
        return stretch

    @property
    def scale(self) -> float:
        """By which rotated elements are multiplied."""
        return 1.0 if self.yarn is None else self.yarn.attention_factor


@dataclass(frozen=True)
class MlaSpec:
    """Multi-head latent attention: keys and values are projections of one latent row for each position.

    Sizes of a query head's parts (`nope` without position, then `rope` elements with it) and of its value.
    """

    q_rank: int
    """Width of what queries are projected from; 0: from the row itself."""
    latent: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True)
class MoeSpec:
    """Experts in place of the MLP of some layers. program.Route and program.Experts have the mathematics."""

    layers: tuple[bool, ...]
    """Which layers have experts; the others have an MLP."""
    experts: int
    top: int
    ffn: int
    """Width of one expert."""
    score: Literal["softmax", "sigmoid", "softmax_top"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    correction: bool = False
    """Whether there is a bias that only chooses (exp_probs_b)."""
    act: Literal["silu", "gelu_tanh", "relu", "swiglu_oai"] = "silu"
    alpha: float = 0.0
    limit: float = 0.0
    """Of swiglu_oai."""
    biases: bool = False
    """Whether the router and the experts have biases."""
    weigh_input: bool = False
    early: bool = False
    """Whether the router reads the row that enters the layer, before attention and without a norm."""
    shared_ffn: int = 0
    """Width of the MLP that every token goes through beside its experts; 0: none."""
    shared_gate: bool = False
    """Whether that MLP's result is multiplied by the sigmoid of one output of a linear of its own."""


@dataclass(frozen=True)
class DeltaSpec:
    """Layers with the gated delta rule in place of attention (program.DeltaRule), behind a short convolution
    of queries, keys and values; the result is normalised head by head and gated."""

    layers: tuple[bool, ...]
    """Which layers have it; the others, one at least, have attention."""
    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    taps: int
    """Of the convolution."""

    @property
    def keys(self) -> int:
        """Width of all keys, and of all queries."""
        return self.k_heads * self.k_dim

    @property
    def values(self) -> int:
        """Width of all values."""
        return self.v_heads * self.v_dim


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer of the llama family.

    Every layer is attention then a gated MLP or experts, each behind an RMS norm and added to the residual.
    """

    architecture: str
    layers: int
    width: int
    """Of the residual stream."""
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the MLP."""
    context: int
    """Positions the model was trained for, context extension included."""
    eps: float
    rope: RopeSpec
    attention_scale: float
    local_rope: RopeSpec | None = None
    """Of layers with a window; None: the same as the others."""
    windows: tuple[int, ...] = ()
    """For each layer how many positions it sees, 0: all."""
    chunk: int = 0
    """Layers with rope see only the positions of their chunk of so many, 0: all."""
    act: Literal["silu", "gelu_tanh"] = "silu"
    embed_scale: float = 1.0
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    qkv_bias: bool = False
    """Whether q, k and v must have biases. Any linear may have one."""
    qk_norm: Literal["none", "head", "head_if_there", "row"] = "none"
    """q and k are normalised before rope, each head by itself (always, or if the file has weights for it) or
    all heads of a row together."""
    unit_qk: bool = False
    """Heads of q and k are normalised after rope, without weights."""
    sinks: bool = False
    """Whether each head has a sink, see program.Attention."""
    nope: tuple[bool, ...] = ()
    """Which layers have no rope; none of them if it is empty."""
    temperature: tuple[int, float] | None = None
    """Span and scale of program.PositionScale, for the queries of layers without rope."""
    post_norms: bool = False
    """The outputs of attention and MLP are normalised before they are added."""
    ffn_norm: str = "ffn_norm"
    """Name of the norm before the MLP."""
    unused_layers: int = 0
    """After the last: heads that predict further tokens, which are not used."""
    moe: MoeSpec | None = None
    mla: MlaSpec | None = None
    """Then head_dim is that of queries, and kv_heads is 1."""
    delta: DeltaSpec | None = None
    gated_attention: bool = False
    """Each head of attn_q is a query and then a gate, by whose sigmoid the head's result is multiplied."""

    def has_delta(self, layer: int) -> bool:
        """Whether a layer has the gated delta rule in place of attention."""
        return self.delta is not None and self.delta.layers[layer]

    def nth_of_kind(self, layer: int) -> int:
        """How many layers before this one have attention, or the delta rule, as it has."""
        return sum(self.has_delta(other) == self.has_delta(layer) for other in range(layer))

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of the MLP."""
        return self.moe is not None and self.moe.layers[layer]

    def rope_of(self, layer: int) -> RopeSpec | None:
        """The rope of a layer; None: it has none."""
        if self.nope and self.nope[layer]:
            return None
        if self.local_rope is not None and self.windows[layer]:
            return self.local_rope
        return self.rope
