"""Model files of a real shape with random weights, so that a speed can be measured without a download.

The values are noise of a sane size. Blocks are drawn in their packed form, never quantised from floats.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ktransformers.engine.weights.formats import FORMATS

U8 = npt.NDArray[np.uint8]
Pools = dict[tuple[str, float], U8]
"""By format and size of values."""
_ALIGNMENT: Final = 32
_POOL_BLOCKS: Final = 1 << 16
"""Blocks that are drawn; a tensor repeats them from a place of its own."""
_MERGED: Final = ("h", "e")
SIGMA: Final = 0.02
"""Of a weight, as models are initialised."""


@dataclass(frozen=True)
class Shape:
    """A dense model of the qwen2 architecture, or with experts one of qwen3moe."""

    name: str
    layers: int
    width: int
    ffn: int
    """Of the MLP, or of one expert."""
    heads: int
    kv_heads: int
    vocab: int
    context: int = 32768
    rope_base: float = 1e6
    head_dim: int = 128
    experts: int = 0
    top: int = 0

    @property
    def architecture(self) -> str:
        return "qwen3moe" if self.experts else "qwen2"


SHAPES: Final = {
    s.name: s
    for s in (
        Shape("qwen2.5-1.5b", 28, 1536, 8960, 12, 2, 151936),
        Shape("qwen3-30b-a3b", 48, 2048, 768, 32, 4, 151936, experts=128, top=8),
    )
}
QUANTS: Final = {
    "Q4_0": ("Q4_0", "Q6_K"),
    "Q4_K": ("Q4_K", "Q6_K"),
    "Q8_0": ("Q8_0", "Q8_0"),
    "BF16": ("BF16", "BF16"),
}
"""Name -> formats of the layers and of the embedding (of qwen2 the output, too)."""

_NUMBERS: Final = {fmt.name: number for number, fmt in FORMATS.items()}


def write(path: Path, shape: Shape, quant: str, layers: int | None = None) -> None:
    """Write the file, whole or not at all. `layers` cuts the model. OSError."""
    shape = shape if layers is None else Shape(**{**vars(shape), "layers": layers})
    tensors = list(_tensors(shape, *QUANTS[quant]))
    part = path.with_name(path.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as file:
        keys = list(_keys(shape, quant))
        header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys)
        offset = 0
        for name, kind, rows, cols in tensors:
            dims = _dims(shape, name, rows, cols)
            header += _text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            header += struct.pack("<IQ", _NUMBERS[kind], offset)
            offset += -(-_size(kind, rows, cols) // _ALIGNMENT) * _ALIGNMENT
        file.write(header + bytes(-len(header) % _ALIGNMENT))
        pools: Pools = {}
        for i, (name, kind, rows, cols) in enumerate(tensors):
            size = _size(kind, rows, cols)
            # Small embeddings would drown in what tokens have in common: all would choose the same experts.
            sigma = 1.0 if shape.experts and name.startswith("token_embd") else SIGMA
            ones = np.ones(cols, np.float32).view(np.uint8)
            data = ones if rows == 0 else noise(pools, kind, i, size, sigma)
            file.write(data.tobytes() + bytes(-size % _ALIGNMENT))
    part.replace(path)


def _dims(shape: Shape, name: str, rows: int, cols: int) -> tuple[int, ...]:
    """As GGUF has them: the fastest first."""
    if rows == 0:
        return (cols,)
    return (cols, rows // shape.experts, shape.experts) if "_exps" in name else (cols, rows)


def _tensors(shape: Shape, layer: str, embedding: str) -> Iterator[tuple[str, str, int, int]]:
    """(name, format, rows, columns); rows 0 is a vector. Rows are those of all experts."""
    width, q, kv = shape.width, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    moe, suffix = max(shape.experts, 1), "_exps" if shape.experts else ""
    yield "token_embd.weight", embedding, shape.vocab, width
    yield "output_norm.weight", "F32", 0, width
    if shape.experts:
        yield "output.weight", embedding, shape.vocab, width
    for i in range(shape.layers):
        for name, rows, cols in (
            ("attn_q", q, width),
            ("attn_k", kv, width),
            ("attn_v", kv, width),
            ("attn_output", width, q),
            (f"ffn_gate{suffix}", moe * shape.ffn, width),
            (f"ffn_up{suffix}", moe * shape.ffn, width),
            (f"ffn_down{suffix}", moe * width, shape.ffn),
        ):
            yield f"blk.{i}.{name}.weight", layer, rows, cols
            if name in ("attn_q", "attn_k", "attn_v") and not shape.experts:
                yield f"blk.{i}.{name}.bias", "F32", 0, rows
        if shape.experts:
            yield f"blk.{i}.ffn_gate_inp.weight", "F32", shape.experts, width
            yield f"blk.{i}.attn_q_norm.weight", "F32", 0, shape.head_dim
            yield f"blk.{i}.attn_k_norm.weight", "F32", 0, shape.head_dim
        yield f"blk.{i}.attn_norm.weight", "F32", 0, width
        yield f"blk.{i}.ffn_norm.weight", "F32", 0, width


def _keys(shape: Shape, quant: str) -> Iterator[bytes]:
    uint32, float32, string, array = 4, 6, 8, 9

    def key(name: str, kind: int, value: bytes) -> bytes:
        return _text(name) + struct.pack("<I", kind) + value

    yield key("general.architecture", string, _text(shape.architecture))
    yield key("general.name", string, _text(f"{shape.name} shape, {shape.layers} layers, random {quant}"))
    yield key("general.alignment", uint32, struct.pack("<I", _ALIGNMENT))
    for name, number in (
        ("block_count", shape.layers),
        ("context_length", shape.context),
        ("embedding_length", shape.width),
        ("feed_forward_length", shape.ffn),
        ("attention.head_count", shape.heads),
        ("attention.head_count_kv", shape.kv_heads),
        ("vocab_size", shape.vocab),
        ("attention.key_length", shape.head_dim),
        ("attention.value_length", shape.head_dim),
        *(
            [
                ("expert_count", shape.experts),
                ("expert_used_count", shape.top),
                ("expert_feed_forward_length", shape.ffn),
            ]
            if shape.experts
            else []
        ),
    ):
        yield key(f"{shape.architecture}.{name}", uint32, struct.pack("<I", number))
    yield key(f"{shape.architecture}.rope.freq_base", float32, struct.pack("<f", shape.rope_base))
    yield key(f"{shape.architecture}.attention.layer_norm_rms_epsilon", float32, struct.pack("<f", 1e-6))
    yield key("tokenizer.ggml.model", string, _text("gpt2"))
    texts = (_vocabulary(shape.vocab), [" ".join(_MERGED)])
    for name, values in zip(("tokens", "merges"), texts, strict=True):
        data = struct.pack("<IQ", string, len(values)) + b"".join(_text(v) for v in values)
        yield key(f"tokenizer.ggml.{name}", array, data)
    yield key("tokenizer.chat_template", string, _text("{% for m in messages %}{{ m.content }}{% endfor %}"))


def _vocabulary(size: int) -> list[str]:
    """Enough to be served: every byte (as GPT-2 writes them), one merge, and tokens that no text has."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    tokens = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))] + ["".join(_MERGED)]
    return (tokens + [f"<{i}>" for i in range(size)])[:size]


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _size(kind: str, rows: int, cols: int) -> int:
    fmt = FORMATS[_NUMBERS[kind]]
    return max(rows, 1) * cols // fmt.block * fmt.nbytes


def noise(pools: Pools, kind: str, seed: int, size: int, sigma: float = SIGMA) -> U8:
    """`size` bytes of valid blocks. `pools` keeps what was drawn for the next tensor of its kind."""
    if kind == "F32":  # routers: repeated rows would be experts that are always chosen together
        values = np.random.default_rng(seed).normal(0, sigma, size // 4).astype(np.float32)
        return values.view(np.uint8)
    pool = pools.get((kind, sigma))
    if pool is None:
        pool = pools[kind, sigma] = _blocks(kind, sigma).reshape(-1)
    block = FORMATS[_NUMBERS[kind]].nbytes
    begin = seed * 7919 % _POOL_BLOCKS * block
    return np.resize(np.roll(pool, -begin), size)


def _blocks(kind: str, sigma: float) -> U8:
    """_POOL_BLOCKS random blocks with scales that make weights of about sigma."""
    random = np.random.default_rng(len(kind))
    if kind == "BF16":
        values = random.normal(0, sigma, _POOL_BLOCKS).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    blocks = random.integers(0, 256, (_POOL_BLOCKS, FORMATS[_NUMBERS[kind]].nbytes), np.uint8)

    def half(at: int, value: float) -> None:
        blocks[:, at : at + 2] = np.array([value], np.float16).view(np.uint8)

    if kind == "Q4_0":  # scale, 4-bit values about 8; without 0 their mean is 0, else layers would add it up
        blocks |= (blocks & 0x0F == 0).astype(np.uint8) << 3 | (blocks & 0xF0 == 0).astype(np.uint8) << 7
        half(0, sigma / 4.5)
    elif kind == "Q8_0":  # scale, 32 signed bytes
        half(0, sigma / 74)
    elif kind == "Q4_K":  # scale, minimum, 6-bit pairs of them, 4-bit values: the mean of both parts is equal
        half(0, sigma / (32 * 4.6))
        half(2, 7.5 * sigma / (32 * 4.6))
    elif kind == "Q6_K":  # 6-bit values about 32, signed bytes as scales, scale
        half(208, sigma / (74 * 18.5))
    else:
        raise ValueError(f"no random blocks of {kind}")
    return blocks
