"""Compiles a ModelSpec and the tensors of a file into the program that executors run."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from ktransformers.engine.models.spec import ModelError, ModelSpec, RopeSpec
from ktransformers.engine.program import (
    Add,
    Attention,
    CacheShape,
    Embed,
    Gated,
    GatherRows,
    Linear,
    LinearPart,
    Logits,
    Op,
    Program,
    RmsNorm,
    Rope,
    Tensor,
    ValueId,
    WeightId,
)
from ktransformers.engine.weights import names
from ktransformers.engine.weights.checkpoint import Checkpoint, StoredTensor
from ktransformers.engine.weights.formats import FORMATS

COMPUTED_FORMATS: Final = frozenset({0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 30})
"""GGUF types that a matrix may have: F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, IQ4_NL and IQ4_XS."""

_F32: Final = 0
_F16: Final = 1
_BF16: Final = 30


@dataclass
class _Tensors:
    """Takes tensors out of a file, each with the shape that the spec says, and knows which were left."""

    file: Checkpoint
    weights: list[Tensor] = field(default_factory=list)
    ids: dict[str, WeightId] = field(default_factory=dict)

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def info(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        info = self.file.tensors.get(name)
        if info is None:
            raise ModelError(f"tensor '{name}' is missing")
        if info.shape != shape:
            raise ModelError(f"tensor '{name}' has shape {list(info.shape)}; the metadata says {list(shape)}")
        return info

    def add(self, tensor: Tensor) -> WeightId:
        self.ids[tensor.name] = len(self.weights)
        self.weights.append(tensor)
        return self.ids[tensor.name]

    def matrix(self, name: str, rows: int, cols: int) -> WeightId:
        """Weights as they are in the file; a tied one is taken once."""
        info = self.info(name, (rows, cols))
        if name in self.ids:
            return self.ids[name]
        if info.format not in COMPUTED_FORMATS:
            supported = ", ".join(FORMATS[f].name for f in sorted(COMPUTED_FORMATS))
            what = f"has format {FORMATS[info.format].name}, which is not supported"
            raise ModelError(f"tensor '{name}' {what}; supported are {supported}")
        return self.add(Tensor(name, info.format, rows, cols, self.file.tensor_bytes(name)))

    def vector(self, name: str, n: int) -> WeightId:
        """Norm weights and biases as F32 [1, n]."""
        return self.add(f32_tensor(name, self.floats(name, n)))

    def floats(self, name: str, n: int) -> npt.NDArray[np.float32]:
        info = self.info(name, (n,))
        raw = Tensor(name, info.format, 1, n, self.file.tensor_bytes(name)).read()
        if info.format == _F32:
            return np.frombuffer(raw.tobytes(), "<f4")
        if info.format == _F16:
            return np.frombuffer(raw.tobytes(), "<f2").astype(np.float32)
        if info.format == _BF16:
            return (np.frombuffer(raw.tobytes(), "<u2").astype(np.uint32) << 16).view(np.float32)
        what = FORMATS[info.format].name
        raise ModelError(f"tensor '{name}' has format {what}; F32, F16 or BF16 is expected")


def f32_tensor(name: str, values: npt.NDArray[np.float32]) -> Tensor:
    """A row of floats as a weight [1, n]."""
    return Tensor(name, _F32, 1, len(values), np.ascontiguousarray(values).view(np.uint8))


@dataclass(frozen=True)
class _Values:
    """The working values of a layer, shared by all layers."""

    x: ValueId
    h: ValueId
    q: ValueId
    k: ValueId
    v: ValueId
    attn: ValueId
    gate: ValueId
    up: ValueId


class _Compiler:
    def __init__(self, spec: ModelSpec, file: Checkpoint) -> None:
        self.spec = spec
        self.tensors = _Tensors(file)
        self.widths: list[int] = []
        self.ops: list[Op] = []
        self.ropes: dict[RopeSpec, WeightId] = {}

    def value(self, width: int) -> ValueId:
        self.widths.append(width)
        return len(self.widths) - 1

    def norm(self, x: ValueId, name: str, out: ValueId, group: int) -> None:
        self.ops.append(RmsNorm(x, self.tensors.vector(name, group), out, group, self.spec.eps))

    def linear(self, x: ValueId, layer: int, *outs: tuple[str, ValueId], needs_bias: bool = False) -> None:
        """One Linear for all products of the same input."""
        parts = []
        for name, out in outs:
            rows = self.widths[out]
            weight = self.tensors.matrix(names.weight(layer, name), rows, self.widths[x])
            bias = names.bias(layer, name)
            has_bias = needs_bias or self.tensors.has(bias)
            parts.append(LinearPart(weight, self.tensors.vector(bias, rows) if has_bias else None, out))
        self.ops.append(Linear(x, tuple(parts)))

    def inv_freq(self, rope: RopeSpec) -> WeightId:
        if rope not in self.ropes:
            divisors = None
            if rope == self.spec.rope and self.tensors.has(names.ROPE_FREQS):
                divisors = self.tensors.floats(names.ROPE_FREQS, rope.dims // 2)
                if not (np.isfinite(divisors) & (divisors > 0)).all():
                    raise ModelError(f"tensor '{names.ROPE_FREQS}' holds values that are not positive")
                self.tensors.ids[names.ROPE_FREQS] = -1
            tensor = f32_tensor(f"rope.inv_freq.{len(self.ropes)}", rope.inv_freq(divisors))
            self.ropes[rope] = self.tensors.add(tensor)
        return self.ropes[rope]

    def attention(self, layer: int, v: _Values) -> None:
        s = self.spec
        self.norm(v.x, names.weight(layer, names.ATTN_NORM), v.h, s.width)
        qkv = ((names.ATTN_Q, v.q), (names.ATTN_K, v.k), (names.ATTN_V, v.v))
        self.linear(v.h, layer, *qkv, needs_bias=s.qkv_bias)
        if s.qk_norm:
            self.norm(v.q, names.weight(layer, names.ATTN_Q_NORM), v.q, s.head_dim)
            self.norm(v.k, names.weight(layer, names.ATTN_K_NORM), v.k, s.head_dim)
        rope = s.rope_of(layer)
        for value, heads in ((v.q, s.heads), (v.k, s.kv_heads)):
            self.ops.append(
                Rope(value, heads, s.head_dim, self.inv_freq(rope), rope.interleaved, rope.scale)
            )
        self.ops.append(
            Attention(
                q=v.q,
                k=v.k,
                v=v.v,
                out=v.attn,
                layer=layer,
                heads=s.heads,
                kv_heads=s.kv_heads,
                head_dim=s.head_dim,
                scale=s.attention_scale,
                window=s.windows[layer],
                softcap=s.attention_softcap,
            )
        )

    def after_attention(self, layer: int, v: _Values) -> None:
        """Output projection, residual, MLP, residual."""
        s = self.spec
        self.linear(v.attn, layer, (names.ATTN_OUT, v.h))
        if s.post_norms:
            self.norm(v.h, names.weight(layer, names.ATTN_POST_NORM), v.h, s.width)
        self.ops.append(Add(v.x, v.h, v.x))
        self.norm(v.x, names.weight(layer, names.FFN_NORM), v.h, s.width)
        self.linear(v.h, layer, (names.FFN_GATE, v.gate), (names.FFN_UP, v.up))
        self.ops.append(Gated(v.gate, v.up, v.gate, s.act))
        self.linear(v.gate, layer, (names.FFN_DOWN, v.h))
        if s.post_norms:
            self.norm(v.h, names.weight(layer, names.FFN_POST_NORM), v.h, s.width)
        self.ops.append(Add(v.x, v.h, v.x))

    def values(self) -> _Values:
        s = self.spec
        kv = s.kv_heads * s.head_dim
        widths = (s.width, s.width, s.heads * s.head_dim, kv, kv, s.heads * s.head_dim, s.ffn, s.ffn)
        return _Values(*(self.value(w) for w in widths))

    def gather(self, v: _Values) -> _Values:
        """What follows the last attention is needed only in the rows that draw a token."""
        rows = _Values(
            self.value(self.spec.width),
            self.value(self.spec.width),
            v.q,
            v.k,
            v.v,
            self.value(self.widths[v.attn]),
            self.value(self.spec.ffn),
            self.value(self.spec.ffn),
        )
        self.ops += [GatherRows(v.x, rows.x), GatherRows(v.attn, rows.attn)]
        return rows

    def vocabulary(self) -> int:
        """Rows of the embedding, which must be as many as the tokenizer has tokens."""
        info = self.tensors.file.tensors.get(names.EMBED)
        if info is None:
            raise ModelError(f"tensor '{names.EMBED}' is missing")
        tokens = self.tensors.file.tokens
        if not tokens:
            raise ModelError("the file has no vocabulary (key 'tokenizer.ggml.tokens')")
        if info.shape[0] != tokens:
            raise ModelError(f"tensor '{names.EMBED}' has {info.shape[0]} rows for {tokens} tokens")
        return info.shape[0]

    def run(self) -> Program:
        s, v, vocab = self.spec, self.values(), self.vocabulary()
        embed = self.tensors.matrix(names.EMBED, vocab, s.width)
        self.ops.append(Embed(embed, v.x, s.embed_scale))
        for layer in range(s.layers):
            self.attention(layer, v)
            if layer == s.layers - 1:
                v = self.gather(v)
            self.after_attention(layer, v)
        self.norm(v.x, names.OUTPUT_NORM, v.h, s.width)
        output = names.OUTPUT if self.tensors.has(names.OUTPUT) else names.EMBED
        logits = self.value(vocab)
        self.ops.append(Logits(v.h, self.tensors.matrix(output, vocab, s.width), logits, s.logit_softcap))
        self.refuse_unused()
        return Program(
            ops=tuple(self.ops),
            widths=tuple(self.widths),
            weights=tuple(self.tensors.weights),
            cache=CacheShape(s.layers, s.kv_heads, s.head_dim),
            vocab=vocab,
        )

    def refuse_unused(self) -> None:
        unused = [name for name in self.tensors.file.tensors if name not in self.tensors.ids]
        if unused:
            some = ", ".join(ascii(name[:64]) for name in unused[:3])
            raise ModelError(f"{len(unused)} tensors are unknown in a {self.spec.architecture} model: {some}")


def compile_program(spec: ModelSpec, file: Checkpoint) -> Program:
    """The program of a model over views of the mapped file; only norms and biases are copied.

    ModelError for a tensor that is missing, left over, of another shape, or in an unsupported format.
    """
    return _Compiler(spec, file).run()
