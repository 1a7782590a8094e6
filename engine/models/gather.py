"""Puts tensors of a Hugging Face checkpoint together, or takes them apart, to what the decoder asks for.

Experts lie in a tensor each, or gate and up of all experts in one; latent attention's up-projection of keys
and values is one matrix. Nothing is read here: what is made is made when it is asked for.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np

from ktransformers.engine.models.spec import MlaSpec, ModelError
from ktransformers.engine.program import U8, Pieces
from ktransformers.engine.weights.dequantise import dequantise
from ktransformers.engine.weights.formats import BF16, F16, F32, GGUF_FORMATS, as_floats
from ktransformers.engine.weights.stored import Stored

_EXPERT: Final = re.compile(r"(.+\.experts)\.(\d{1,5})\.(\w+)\.weight", re.ASCII)
_CANONICAL: Final = {
    **{name: name for name in ("gate_proj", "up_proj", "down_proj")},
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
    **{name: f"{name}_proj" for name in ("gate", "up", "down")},
}
_FUSED: Final = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)(_bias)?", re.ASCII)
_ITEMS: Final[dict[int, np.dtype[np.unsignedinteger[Any]]]] = {
    F32: np.dtype("<u4"),
    F16: np.dtype("<u2"),
    BF16: np.dtype("<u2"),
}

Rows = slice
"""Which rows of a matrix."""


def gather(stored: Mapping[str, Stored], *, inputs_first: bool, alternate: bool) -> dict[str, Stored]:
    """Experts under "…experts.gate_proj.weight" and so on, as [experts, rows, cols]; the rest as it is.

    `inputs_first`: matrices of fused experts are [inputs, outputs] (unless they are quantised). `alternate`:
    their gate and up take turns, else all of gate comes first.
    """
    found: dict[str, Stored] = {}
    single: dict[str, dict[int, Stored]] = {}
    for name, tensor in stored.items():
        if (match := _EXPERT.fullmatch(name)) and match[3] in _CANONICAL:
            single.setdefault(f"{match[1]}.{_CANONICAL[match[3]]}.weight", {})[int(match[2])] = tensor
        elif match := _FUSED.fullmatch(name):
            _take_apart(found, match, tensor, inputs_first, alternate)
        elif name.endswith(".shared_expert_gate.weight") and len(tensor.shape) == 2 and tensor.shape[0] == 1:
            found[name] = replace(tensor, shape=tensor.shape[1:])
        else:
            found[name] = tensor
    for name, experts in single.items():
        found[name] = _stack(name, experts)
    return found


def _stack(name: str, experts: Mapping[int, Stored]) -> Stored:
    first = experts[min(experts)]
    for e in range(len(experts)):
        if e not in experts:
            raise ModelError(f"tensor '{name}' of expert {e} is missing")
        if (experts[e].shape, experts[e].format) != (first.shape, first.format):
            raise ModelError(f"tensor '{name}' of expert {e} has another shape or format than the others")
    readers = tuple(partial(_whole, experts[e]) for e in range(len(experts)))
    nbytes = sum(t.nbytes for t in experts.values())
    return Stored(first.format, (len(experts), *first.shape), nbytes, Pieces(nbytes, readers))


def _take_apart(
    found: dict[str, Stored], match: re.Match[str], tensor: Stored, inputs_first: bool, alternate: bool
) -> None:
    kind = "bias" if match[3] else "weight"
    if len(tensor.shape) != (2 if match[3] else 3):
        raise ModelError(f"tensor {match[0][-80:]!a} has shape {list(tensor.shape)}")
    if match[3]:
        tensor = replace(tensor, shape=(*tensor.shape, 1))
    elif inputs_first and tensor.format in _ITEMS:
        tensor = _turned(tensor)
    rows = tensor.shape[1]
    halves: dict[str, Rows] = {"down_proj": slice(0, rows)}
    if match[2] == "gate_up_proj":
        halves = {"gate_proj": slice(0, rows // 2), "up_proj": slice(rows // 2, rows)}
        if alternate:
            halves = {"gate_proj": slice(0, rows, 2), "up_proj": slice(1, rows, 2)}
    for name, part in halves.items():
        taken = _rows(tensor, part)
        found[f"{match[1]}.{name}.{kind}"] = replace(taken, shape=taken.shape[:2]) if match[3] else taken


def split_latent(tensor: Stored, mla: MlaSpec, heads: int) -> tuple[Stored, Stored]:
    """kv_b_proj [heads * (nope + value), latent] as attn_k_b [heads, latent, nope] and attn_v_b [heads,
    value, latent]. Keys are transposed, which formats of blocks are not: they become BF16, a share of a
    hundredth of a large model."""
    if tensor.shape != (heads * (mla.nope + mla.value), mla.latent):
        raise ModelError(f"a kv_b_proj has shape {list(tensor.shape)}, which the heads do not fit")
    by_head = replace(tensor, shape=(heads, mla.nope + mla.value, mla.latent))
    keys = _rows(by_head, slice(0, mla.nope))
    return _turned(keys), _rows(by_head, slice(mla.nope, mla.nope + mla.value))


def _whole(tensor: Stored) -> U8:
    if not isinstance(tensor.data, Pieces):
        return tensor.data.reshape(-1)
    pieces = [read() for read in tensor.data.read]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _matrix(tensor: Stored, i: int) -> U8:
    """The bytes of matrix i of a tensor of three dimensions [rows, bytes of a row]."""
    count, rows = tensor.shape[:2]
    if not isinstance(tensor.data, Pieces):
        part: U8 = tensor.data.reshape(count, rows, -1)[i]
        return part
    if len(tensor.data.read) == count:
        return tensor.data.read[i]().reshape(rows, -1)
    one: U8 = _last_whole(tensor).reshape(count, rows, -1)[i]
    return one


@lru_cache(maxsize=1)
def _last_whole(tensor: Stored) -> U8:
    """Heads are asked for one after another, of a matrix that may have to be put together as a whole."""
    return _whole(tensor)


def _made(tensor: Stored, shape: tuple[int, ...], nbytes: int, one: Callable[[int], U8]) -> Stored:
    readers = tuple(partial(one, i) for i in range(shape[0]))
    return replace(tensor, shape=shape, nbytes=nbytes, data=Pieces(nbytes, readers))


def _rows(tensor: Stored, part: Rows) -> Stored:
    """Some rows of each matrix. Rows are runs of bytes in every format."""
    count, rows, cols = tensor.shape
    taken = len(range(rows)[part])

    def one(i: int) -> U8:
        return np.ascontiguousarray(_matrix(tensor, i)[part]).reshape(-1)

    return _made(tensor, (count, taken, cols), tensor.nbytes // rows * taken, one)


def _turned(tensor: Stored) -> Stored:
    """Each matrix transposed."""
    count, rows, cols = tensor.shape
    if tensor.format not in _ITEMS:
        return _turned(_bf16(tensor))
    item = _ITEMS[tensor.format]

    def one(i: int) -> U8:
        matrix = np.frombuffer(np.ascontiguousarray(_matrix(tensor, i)), item).reshape(rows, cols)
        return np.ascontiguousarray(matrix.T).view(np.uint8).reshape(-1)

    return _made(tensor, (count, cols, rows), tensor.nbytes, one)


def _bf16(tensor: Stored) -> Stored:
    """Each matrix rounded to BF16."""

    def one(i: int) -> U8:
        raw = _matrix(tensor, i).reshape(-1)
        values = as_floats(raw, tensor.format)
        if values is None:
            values = dequantise(raw[None], tensor.format)[0]
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return rounded.astype(np.uint16).view(np.uint8)

    if tensor.format in GGUF_FORMATS and tensor.format not in _ITEMS:
        raise ModelError(f"a kv_b_proj has format {tensor.format}, which cannot be transposed")
    count = tensor.shape[0]
    nbytes = int(np.prod(tensor.shape)) * 2
    out = _made(tensor, (count, *tensor.shape[1:]), nbytes, one)
    return replace(out, format=BF16)
