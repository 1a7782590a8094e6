"""Folders made to break the readers or the loader: each costs one short error that names what is wrong."""

import json
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.models.decoder import compile_program
from ktransformers.engine.models.folder import open_folder
from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.program import Program
from ktransformers.engine.weights.files import FolderError
from ktransformers.engine.weights.safetensors import SafetensorsError, read_file

MAX_PEAK = 4 * 2**20
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 16,
}
SHAPES = {
    "model.embed_tokens.weight": [16, 32],
    "model.norm.weight": [32],
    "lm_head.weight": [16, 32],
    "model.layers.0.input_layernorm.weight": [32],
    "model.layers.0.self_attn.q_proj.weight": [32, 32],
    "model.layers.0.self_attn.k_proj.weight": [16, 32],
    "model.layers.0.self_attn.v_proj.weight": [16, 32],
    "model.layers.0.self_attn.o_proj.weight": [32, 32],
    "model.layers.0.post_attention_layernorm.weight": [32],
    "model.layers.0.mlp.gate_proj.weight": [32, 32],
    "model.layers.0.mlp.up_proj.weight": [32, 32],
    "model.layers.0.mlp.down_proj.weight": [32, 32],
}
Q = "model.layers.0.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


def header(shapes: dict[str, list[int]] = SHAPES) -> dict[str, Any]:
    entries, offset = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return entries


def file(entries: dict[str, Any] | str, size: int | None = None) -> bytes:
    """A safetensors file of a header (or its text) and as many bytes of data as the valid one has."""
    text = entries if isinstance(entries, str) else json.dumps(entries)
    data = np.random.default_rng(0).standard_normal(16 * 1024).astype("<f4").tobytes()
    return struct.pack("<Q", len(text.encode())) + text.encode() + data[: DATA if size is None else size]


def whole(shapes: dict[str, list[int]]) -> bytes:
    """A file with all of its data."""
    entries = header(shapes)
    return file(entries, max(e["data_offsets"][1] for e in entries.values()))


DATA = max(e["data_offsets"][1] for e in header().values())
VALID = file(header())


def write(path: Path, model: bytes | None = VALID, config: object = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    text = config if isinstance(config, str) else json.dumps(config)
    (path / "config.json").write_text(text)
    if model is not None:
        (path / "model.safetensors").write_bytes(model)
    return path


def load(path: Path) -> Program:
    model = open_folder(path)
    return compile_program(model.spec, model)


def refused(path: Path, *words: str) -> None:
    with pytest.raises((FolderError, ModelError)) as error:
        load(path)
        pytest.fail(f"accepted: {words}")
    message = str(error.value)
    assert "\n" not in message and len(message) < 500, message
    assert all(word in message for word in words), f"{words} in {message}"


def test_the_valid_folder_is_valid(tmp_path: Path) -> None:
    program = load(write(tmp_path / "m"))
    NativeExecutor(program, blocks=1, max_tokens=4, max_rows=4, threads=1).close()


def with_entry(**changes: object) -> bytes:
    entries = header()
    entries[Q] = {k: v for k, v in {**entries[Q], **changes}.items() if v is not ...}
    return file(entries)


def truncated() -> Iterator[tuple[bytes, str]]:
    for at in (0, 7, 8, 20, len(VALID) - DATA - 1, len(VALID) - DATA, len(VALID) - 1):
        yield VALID[:at], "model.safetensors"


def lengths() -> Iterator[tuple[bytes, str]]:
    for n in (0, 1, 2**32, 2**63, 2**64 - 1, 64 * 2**20 + 1, len(VALID)):
        yield struct.pack("<Q", n) + VALID[8:], "header"


def headers() -> Iterator[tuple[bytes, str]]:
    yield file("[]"), "not a JSON object"
    yield file("{" * 100_000), "header"
    yield file('{"a":' * 2000 + "1" + "}" * 2000), "nested"
    yield file("[" * 50_000 + "]" * 50_000), "header"
    yield file('{"a": NaN}'), "'a'"
    yield file('{"a": 1' + "0" * 5000 + "}"), "header"
    yield struct.pack("<Q", 4) + b"\xff\xfe{}" + bytes(64), "UTF-8"
    yield file({**header(), "x" * 600: header()[Q]}), "characters"
    yield file({**header(), "": header()[Q]}), "characters"
    text = json.dumps(header())
    yield file(text[:-1] + f', "{Q}": {json.dumps(header()[Q])}}}'), "twice"


def entries() -> Iterator[tuple[bytes, str]]:
    for missing in ("dtype", "shape", "data_offsets"):
        yield with_entry(**{missing: ...}), Q
    yield with_entry(extra=1), Q
    for dtype in ("F31", "", 5, None, "f32", "I4", ["F32"], "C64"):
        yield with_entry(dtype=dtype), "dtype"
    big = 2**63
    for shape in ([0, 32], [-1, 32], [32], [33, 32], [big, big], [2**40 + 1], "32", [32.0, 32], [True, 1024]):
        yield with_entry(shape=shape), "q_proj"
    yield with_entry(shape=[1, 1, 1, 32, 32]), "shape"
    for offsets in ([0, 1], [-4096, 0], [0], [0, 4096, 1], [4096, 0], [0.0, 4096.0], [big, big + 4096], None):
        yield with_entry(data_offsets=offsets), Q
    yield with_entry(data_offsets=[10**4000, 10**4000 + 4096]), Q
    yield with_entry(data_offsets=[DATA - 4095, DATA + 1]), "partial"
    yield with_entry(data_offsets=[4, 4100]), "overlaps"


def tensors() -> Iterator[tuple[bytes, str]]:
    for name in SHAPES:
        yield whole({k: v for k, v in SHAPES.items() if k != name}), "missing"
    yield whole({**SHAPES, "model.layers.0.mlp.extra.weight": [4]}), "mlp.extra"
    yield whole({**SHAPES, "model.layers.1.mlp.up_proj.weight": [4]}), "unknown"
    yield whole({**SHAPES, "model.layers.00.mlp.up_proj.weight": [4]}), "same"
    yield whole({**SHAPES, "model.layers.99999999.x.weight": [4]}), "unknown"
    yield whole({**SHAPES, Q: [16, 64]}), "shape"
    for dtype in ("I64", "F64", "BOOL", "F8_E4M3"):
        size = {"I64": 8, "F64": 8}.get(dtype, 1)
        wrong = header()
        begin = max(e["data_offsets"][1] for e in wrong.values())
        wrong[Q] = {"dtype": dtype, "shape": [32, 32], "data_offsets": [begin, begin + 1024 * size]}
        yield file(wrong, begin + 1024 * size), dtype


RULES: list[Callable[[], Iterator[tuple[bytes, str]]]] = [truncated, lengths, headers, entries, tensors]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_hostile_files(rule: Callable[[], Iterator[tuple[bytes, str]]], tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        for data, word in rule():
            write(tmp_path / "m", data)
            tracemalloc.reset_peak()
            refused(tmp_path / "m", word)
            assert tracemalloc.get_traced_memory()[1] < MAX_PEAK, word
    finally:
        tracemalloc.stop()


def shards(path: Path) -> dict[str, Any]:
    """The valid model in two files; the index that goes with them, to be changed and written."""
    write(path, None)
    names = list(SHAPES)
    places = {}
    for i, part in enumerate((names[:5], names[5:])):
        name = f"model-{i + 1:05d}-of-00002.safetensors"
        entries = header({n: SHAPES[n] for n in part})
        (path / name).write_bytes(file(entries, max(e["data_offsets"][1] for e in entries.values())))
        places |= dict.fromkeys(part, name)
    return {"metadata": {}, "weight_map": places}


def index(path: Path, document: object) -> Path:
    (path / INDEX).write_text(json.dumps(document))
    return path


def test_shards(tmp_path: Path) -> None:
    document = shards(tmp_path)
    whole = load(write(tmp_path / "whole"))
    split = load(index(tmp_path, document))
    assert {w.name for w in split.weights} == {w.name for w in whole.weights}


def test_an_index_that_lies(tmp_path: Path) -> None:
    document = shards(tmp_path)
    places = document["weight_map"]
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    (tmp_path.parent / "outside.safetensors").write_bytes(VALID)
    for name in ("/etc/passwd", "..", "", 7, "x.bin", "a\0b", "model.safetensors.bin"):
        refused(index(tmp_path, {"weight_map": {**places, Q: name}}), INDEX)
    for name in (
        "../outside.safetensors",
        "/x.safetensors",
        "s/m.safetensors",
        "..\\x.safetensors",
        "a\0.safetensors",
    ):
        refused(index(tmp_path, {"weight_map": {**places, Q: name}}), "not the name of a file")
    refused(index(tmp_path, {"weight_map": {**places, Q: "none.safetensors"}}), "none.safetensors", "missing")
    refused(index(tmp_path, {"weight_map": {**places, "lm_head.weight": second}}), "lm_head", "does not")
    refused(index(tmp_path, {"weight_map": {**places, "ghost": first}}), "ghost")
    refused(index(tmp_path, {"weight_map": {k: v for k, v in places.items() if k != Q}}), "q_proj")
    refused(index(tmp_path, {"weight_map": {}}), "weight_map")
    refused(index(tmp_path, {"weight_map": []}), "weight_map")
    refused(index(tmp_path, {"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(1025)}}), "1024")
    refused(index(tmp_path, []), INDEX)
    index(tmp_path, document)
    (tmp_path / second).unlink()
    refused(tmp_path, second, "missing")
    (tmp_path / second).write_bytes((tmp_path / first).read_bytes())
    refused(tmp_path, second, "earlier file")


def test_links(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", None)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(VALID)
    (folder / "model.safetensors").symlink_to(outside)
    refused(folder, "link to outside")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    refused(folder, "model.safetensors")
    # As huggingface_hub keeps what it has downloaded.
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "0a1b", tmp_path / "hub" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    write(snapshot, None)
    (blobs / "ff00").write_bytes(VALID)
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/ff00"))
    load(snapshot)


def test_not_a_model(tmp_path: Path) -> None:
    refused(tmp_path, "config.json", "missing")
    refused(write(tmp_path / "m", None), "model.safetensors", "missing")
    for config in ("", "[]", "{", "nul", '{"a": 1, "a": 2}', "{" * 10**6, '"llama"', "\ufeff{}"):
        refused(write(tmp_path / "m", config=config), "config.json")
    write(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_bytes(b"\xff{}")
    refused(tmp_path / "m", "config.json", "UTF-8")
    refused(write(tmp_path / "m", config={**CONFIG, "x": "y" * 5 * 2**20}), "config.json", "more than")
    refused(write(tmp_path / "m", config={**CONFIG, "quantization_config": {"quant_method": "no"}}), "no")


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - DATA - 1), st.binary(min_size=1, max_size=1)), max_size=4)
)
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, bytes]]) -> None:
    """A mutated header is refused or read, and never raises anything else."""
    data = bytearray(VALID)
    for at, byte in changes:
        data[at : at + 1] = byte
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data)
    try:
        found, whole, _ = read_file(path)
    except SafetensorsError as e:
        assert "\n" not in str(e)
        return
    except FolderError as e:
        assert "\n" not in str(e) and "header" in str(e)
        return
    assert all(t.offset + t.nbytes <= len(whole) for t in found.values())
