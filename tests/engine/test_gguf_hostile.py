"""Files made to break the reader or the loader: each costs one short error, never a crash, a hang or memory.

A tiny valid model is written field by field; its fields are then cut, lied about, repeated and exchanged, by
rule (each known CVE shape of other readers among them) and at random.
"""

import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ktransformers.engine.batch import Batch
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.models.decoder import compile_program
from ktransformers.engine.models.registry import read_spec
from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.program import Program
from ktransformers.engine.weights.gguf import GgufError, read

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
PACK = {U8: "<B", U32: "<I", I32: "<i", F32: "<f", BOOL: "<B", U64: "<Q"}
BIG = (2**64 - 1, 2**63, 2**63 - 1, 2**32, 2**31)
MAX_PEAK = 4 * 2**20
"""Bytes: the file has less than 64 KiB, a vocabulary of 16 tokens and no reason for more than this."""


@dataclass(frozen=True)
class Info:
    name: str
    dims: tuple[int, ...]
    kind: int = 0
    offset: int | None = None
    """None: after the tensor before it."""


KEYS: dict[str, tuple[int, object]] = {
    "general.architecture": (STRING, "llama"),
    "general.alignment": (U32, 32),
    "llama.block_count": (U32, 1),
    "llama.context_length": (U32, 64),
    "llama.embedding_length": (U32, 32),
    "llama.feed_forward_length": (U32, 32),
    "llama.attention.head_count": (U32, 2),
    "llama.attention.head_count_kv": (U32, 1),
    "llama.attention.key_length": (U32, 16),
    "llama.attention.value_length": (U32, 16),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.freq_base": (F32, 1e4),
    "llama.rope.dimension_count": (U32, 16),
    "tokenizer.ggml.tokens": (STRING, [f"t{i}" for i in range(16)]),
    "tokenizer.ggml.scores": (F32, [0.5] * 16),
}
TENSORS = [
    Info("token_embd.weight", (32, 16)),
    Info("output_norm.weight", (32,)),
    Info("blk.0.attn_norm.weight", (32,)),
    Info("blk.0.attn_q.weight", (32, 32), 8),
    Info("blk.0.attn_k.weight", (32, 16)),
    Info("blk.0.attn_v.weight", (32, 16), 1),
    Info("blk.0.attn_output.weight", (32, 32)),
    Info("blk.0.ffn_norm.weight", (32,)),
    Info("blk.0.ffn_gate.weight", (32, 32)),
    Info("blk.0.ffn_up.weight", (32, 32)),
    Info("blk.0.ffn_down.weight", (32, 32)),
]
SIZES = {0: (1, 4), 1: (1, 2), 8: (32, 34)}


@dataclass
class Mark:
    """A field: where it is, how long, and what it means."""

    offset: int
    size: int
    what: str


@dataclass
class Writer:
    data: bytearray = field(default_factory=bytearray)
    marks: list[Mark] = field(default_factory=list)

    def put(self, what: str, raw: bytes) -> None:
        self.marks.append(Mark(len(self.data), len(raw), what))
        self.data += raw

    def u32(self, what: str, n: int) -> None:
        self.put(what, struct.pack("<I", n))

    def u64(self, what: str, n: int) -> None:
        self.put(what, struct.pack("<Q", n))

    def string(self, what: str, s: str) -> None:
        self.u64(f"length of {what}", len(s.encode()))
        self.put(f"text of {what}", s.encode())

    def value(self, key: str, kind: int, value: object) -> None:
        if not isinstance(value, list):
            self.u32(f"type of {key}", kind)
            self.scalar(key, kind, value)
            return
        self.u32(f"type of {key}", ARRAY)
        self.u32(f"element type of {key}", kind)
        self.u64(f"count of {key}", len(value))
        for v in value:
            self.scalar(f"element of {key}", kind, v)

    def scalar(self, what: str, kind: int, value: object) -> None:
        if kind == STRING:
            self.string(what, str(value))
        else:
            self.put(f"value of {what}", struct.pack(PACK[kind], value))


def write(
    keys: dict[str, tuple[int, object]] = KEYS, tensors: list[Info] = TENSORS, alignment: int = 32
) -> Writer:
    w = Writer()
    w.put("magic", b"GGUF")
    w.u32("version", 3)
    w.u64("tensor_count", len(tensors))
    w.u64("kv_count", len(keys))
    for key, (kind, value) in keys.items():
        w.string(f"key {key}", key)
        w.value(key, kind, value)
    rng = np.random.default_rng(0)
    blob = bytearray()
    for t in tensors:
        w.string(f"name of {t.name}", t.name)
        w.u32(f"n_dims of {t.name}", len(t.dims))
        for d in t.dims:
            w.u64(f"dim of {t.name}", d)
        w.u32(f"format of {t.name}", t.kind)
        blob += bytes(-len(blob) % alignment)
        w.u64(f"offset of {t.name}", len(blob) if t.offset is None else t.offset)
        block, size = SIZES[t.kind]
        values = rng.standard_normal(max(min(int(np.prod(t.dims, dtype=object)), 2**12), 1))
        raw = values.astype("<f2" if t.kind == 1 else "<f4").tobytes()
        if block > 1:
            raw = bytes(range(size)) * (len(values) // block)
        blob += raw
    w.data += bytes(-len(w.data) % alignment)
    w.put("data", bytes(blob))
    return w


VALID = write()


def edit(mark: Mark, raw: bytes) -> bytes:
    """The valid file with one field replaced."""
    data = bytearray(VALID.data)
    data[mark.offset : mark.offset + mark.size] = raw
    return bytes(data)


def truncations() -> Iterator[tuple[str, bytes]]:
    """In front of each field (of the strings of the vocabulary, the first few) and in its middle."""
    for mark in VALID.marks[:-1]:
        for at in {mark.offset, mark.offset + mark.size // 2}:
            yield f"cut {at}: {mark.what}", bytes(VALID.data[:at])
    last = VALID.marks[-1]
    for at in (last.offset, last.offset + 1, len(VALID.data) - 1):
        yield f"cut {at}: data", bytes(VALID.data[:at])


def lies() -> Iterator[tuple[str, bytes]]:
    """Each count, length, type, dimension and offset, replaced by what overflows or does not exist."""
    seen: set[str] = set()
    for mark in VALID.marks:
        name = mark.what.split(" of ")[0]
        if mark.what in seen:
            continue
        seen.add(mark.what)
        if mark.what in ("tensor_count", "kv_count") or name in ("length", "count"):
            for n in (*BIG, 10**7 + 1, 16 * 2**20 + 1):
                yield f"{mark.what} = {n}", edit(mark, struct.pack("<Q", n))
        if name in ("type", "element type", "format"):
            for n in (13, 255, 2**31, 2**32 - 1, ARRAY if name == "element type" else 4):
                if name != "type" or n != U32:
                    yield f"{mark.what} = {n}", edit(mark, struct.pack("<I", n))
        if name == "n_dims":
            for n in (0, 5, 2**31, 2**32 - 1):
                yield f"{mark.what} = {n}", edit(mark, struct.pack("<I", n))
        if name == "dim":
            for n in (0, 31, 2**40 + 32, *BIG):
                yield f"{mark.what} = {n}", edit(mark, struct.pack("<Q", n))
        if name == "offset":
            for n in (1, 33, 2**20, 2**64 - 32, *BIG):
                yield f"{mark.what} = {n}", edit(mark, struct.pack("<Q", n))


def with_key(key: str, kind: int, value: object) -> bytes:
    return bytes(write({**KEYS, key: (kind, value)}).data)


def wrong_keys() -> Iterator[tuple[str, bytes]]:
    """Each key missing, of another type, or with a number that no model has."""
    optional = {"general.alignment", "tokenizer.ggml.scores", "llama.rope.freq_base"}
    derived = {"attention.key_length", "attention.value_length", "rope.dimension_count"}
    optional |= {f"llama.{k}" for k in derived}
    for key, (kind, _) in KEYS.items():
        if key not in optional:
            yield f"no {key}", bytes(write({k: v for k, v in KEYS.items() if k != key}).data)
        if key.startswith("llama."):
            yield f"{key} is a string", with_key(key, STRING, "8")
            yield f"{key} is an array", with_key(key, U32, [1, 2])
            yield f"{key} is a bool", with_key(key, BOOL, 1)
            numbers = (0, 2**32 - 1, 7) if kind == U32 else (0.0, -1.0, float("nan"), float("inf"), 1e30)
            for n in numbers:
                # A context of any length up to 2^24 is a model, and 7 positions are one.
                if not (key.endswith("context_length") and n == 7):
                    yield f"{key} = {n}", with_key(key, kind, n)
    for key in ("general.type", "general.architecture", "llama.rope.scaling.type", "llama.expert_count"):
        yield f"{key} is numbers", with_key(key, U32, [0, 0])
        yield f"{key} is strings", with_key(key, STRING, ["model", "none"])
    for key in ("split.no", "split.count", "split.tensors.count"):
        yield f"{key} is numbers", bytes(write({**KEYS, "split.count": (U32, 2), key: (U32, [1, 2])}).data)
    for n in (0, 1, 4, 33, 8192, 2**32 - 1):
        yield f"alignment {n}", with_key("general.alignment", U32, n)
    yield "alignment is a string", with_key("general.alignment", STRING, "32")
    yield "alignment of another type", with_key("general.alignment", F32, 32.0)
    yield "bool of value 2", with_key("tokenizer.ggml.add_bos_token", BOOL, 2)
    yield "bools of value 2", with_key("x", BOOL, [1, 2])
    yield "unknown key", with_key("llama.swiglu_limit", F32, 7.0)
    yield "experts", with_key("llama.expert_count", U32, 8)
    yield "not causal", with_key("llama.attention.causal", BOOL, 0)
    yield "longrope", with_key("llama.rope.scaling.type", STRING, "longrope")
    yield "yarn of nothing", with_key("llama.rope.scaling.type", STRING, "yarn")
    yield "factor without type", with_key("llama.rope.scaling.factor", F32, 4.0)
    yield "unknown architecture", with_key("general.architecture", STRING, "x" * 1000 + "\n")
    yield "an adapter", with_key("general.type", STRING, "adapter")
    yield "too few tokens", with_key("tokenizer.ggml.tokens", STRING, ["t"] * 15)
    yield "too many tokens", with_key("tokenizer.ggml.tokens", STRING, ["t"] * 17)
    yield "tokens are numbers", with_key("tokenizer.ggml.tokens", U32, [1] * 16)
    yield "a split model", with_key("split.count", U32, 2)
    yield "a huge split", with_key("split.count", U32, 2**31)


def wrong_tensors() -> Iterator[tuple[str, bytes]]:
    """Each tensor missing, repeated, of another shape or format, or lying over another."""
    for i, t in enumerate(TENSORS):
        others = TENSORS[:i] + TENSORS[i + 1 :]
        yield f"no {t.name}", bytes(write(tensors=others).data)
        yield f"two {t.name}", bytes(write(tensors=[*TENSORS, t]).data)
        yield f"transposed {t.name}", bytes(write(tensors=[*others, replace(t, dims=(64, *t.dims[1:]))]).data)
        yield f"deeper {t.name}", bytes(write(tensors=[*others, replace(t, dims=(*t.dims, 2))]).data)
        yield f"renamed {t.name}", bytes(write(tensors=[*others, replace(t, name=t.name + "\n")]).data)
        if i:
            yield f"overlap {t.name}", bytes(write(tensors=[*others, replace(t, offset=0)]).data)
    extra = Info("blk.0.attn_q.scale", (32,))
    yield "unknown tensor", bytes(write(tensors=[*TENSORS, extra]).data)
    yield "a second layer", bytes(write(tensors=[*TENSORS, Info("blk.1.attn_norm.weight", (32,))]).data)
    yield "overflowing product", bytes(write(tensors=[*TENSORS, Info("x", (2**33, 2**33))]).data)
    yield "empty name", bytes(write(tensors=[*TENSORS, Info("", (32,))]).data)
    yield "zero rope factors", bytes(write(tensors=[*TENSORS, Info("rope_freqs.weight", (9,))]).data)


def raw() -> Iterator[tuple[str, bytes]]:
    """What is no GGUF file of ours at all."""
    data = bytes(VALID.data)
    yield "other magic", b"GGML" + data[4:]
    yield "zeros", bytes(4096)
    yield "0xff", b"\xff" * 4096
    for version in (0, 1, 4, 2**32 - 1):
        yield f"version {version}", edit(VALID.marks[1], struct.pack("<I", version))
    yield "big-endian", edit(VALID.marks[1], struct.pack(">I", 3))
    text = next(m for m in VALID.marks if m.what == "text of key llama.block_count")
    yield "key is not UTF-8", edit(text, b"\xff" * text.size)
    word = next(m for m in VALID.marks if m.what == "text of element of tokenizer.ggml.tokens")
    yield "token is not UTF-8", edit(word, b"\xff" * word.size)
    yield "a key twice", data.replace(b"llama.rope.dimension_count", b"llama.attention.key_length")


RULES: list[Callable[[], Iterator[tuple[str, bytes]]]] = [truncations, lies, wrong_keys, wrong_tensors, raw]
SHAPES = {name: data for rule in RULES for name, data in rule()}


def load(path: Path) -> Program:
    f = read(path)
    return compile_program(read_spec(f.metadata), f)


def run(program: Program) -> None:
    """One step on each executor, so that every weight is read."""

    def i32(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.array(values, np.int32)

    batch = Batch(i32(1, 2, 3), i32(0, 3), i32(0), i32(0, 1), i32(0), i32(2))
    for executor in (
        TorchExecutor(program, blocks=1, block_tokens=16, max_tokens=4, threads=1),
        NativeExecutor(program, blocks=1, max_tokens=4, max_rows=4, threads=1),
    ):
        assert executor.logits(batch).shape == (1, program.vocab)
        executor.close()


def test_the_valid_file_is_valid(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(VALID.data)
    run(load(tmp_path / "m.gguf"))


def test_there_are_many_shapes() -> None:
    assert len(SHAPES) >= 200


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_hostile_shapes(rule: Callable[[], Iterator[tuple[str, bytes]]], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tracemalloc.start()
    try:
        for name, data in rule():
            path.write_bytes(data)
            tracemalloc.reset_peak()
            begin = time.process_time()
            with pytest.raises((GgufError, ModelError)) as error:
                load(path)
                pytest.fail(f"accepted: {name}")
            message = str(error.value)
            assert "\n" not in message and len(message) < 500, name
            assert tracemalloc.get_traced_memory()[1] < MAX_PEAK, name
            assert time.process_time() - begin < 2, name
    finally:
        tracemalloc.stop()


HEADER = VALID.marks[-1].offset


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, HEADER - 1), st.sampled_from((0, 1, 2, 8, 9, 31, 32, 127, 128, 254, 255))),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 3),
)
def test_random_bytes(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int
) -> None:
    """A mutated file is refused, or it is a model that runs."""
    data = bytearray(VALID.data)
    for at, byte in changes:
        data[at] = byte
    if cut == 3:
        del data[changes[0][0] :]
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(data)
    try:
        program = load(path)
    except (GgufError, ModelError) as e:
        assert "\n" not in str(e) and len(str(e)) < 500
        return
    run(program)
