"""K5: whatever changes the bytes of KV changes the fingerprint: no block of another model is found."""

from collections.abc import Callable
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest

from ktransformers.engine import _kernels
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.disk_tier import MOST, own_size
from ktransformers.engine.executors.build import build_executor
from ktransformers.engine.load import fingerprint, open_model
from ktransformers.engine.plan import plan
from ktransformers.engine.weights.gguf import read
from ktransformers.kvcache.config import CacheConfig

ISAS = _kernels.isas()


def make(path: Path, change: Callable[[gguf.GGUFWriter], None] = lambda w: None) -> Path:
    """A llama of two layers; `change` adds metadata."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(2)
    w.add_context_length(512)
    w.add_embedding_length(64)
    w.add_feed_forward_length(64)
    w.add_head_count(2)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_token_list([f"t{i}" for i in range(32)])
    change(w)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (32, 64), "output_norm": (64,)}
    for layer in range(2):
        shapes |= {f"blk.{layer}.attn_{n}": (64, 64) for n in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{n}": (64, 64) for n in ("gate", "up", "down")}
        shapes |= {f"blk.{layer}.{n}_norm": (64,) for n in ("attn", "ffn")}
    for name, shape in shapes.items():
        w.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def of(path: Path, **settings: object) -> bytes:
    config = msgspec.convert({"model": str(path), "max_sequences": 2, **settings}, EngineConfig)
    program, facts = open_model(config)
    executor = build_executor(config, program, plan(config, program, facts), lambda done, total: None)
    found = fingerprint(config, program, facts, executor)
    executor.close()
    return found


def test_it_is_that_of_the_contents(tmp_path: Path) -> None:
    one = of(make(tmp_path / "one.gguf"))
    assert len(one) == 32
    assert one == of(make(tmp_path / "another name.gguf"))
    assert one == of(tmp_path / "one.gguf", threads=1, max_batch_tokens=64, context=256)


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_a_bit_of_any_weight(tmp_path: Path, executor: str) -> None:
    path = make(tmp_path / "model.gguf")
    file = read(str(path))
    seen = {of(path, executor=executor)}
    rng = np.random.default_rng(2)
    whole = path.read_bytes()
    for i, info in enumerate(file.tensors.values()):
        changed = bytearray(whole)
        changed[info.offset + int(rng.integers(info.nbytes))] ^= 1
        path.write_bytes(changed)
        seen.add(of(path, executor=executor))
        assert len(seen) == i + 2


def test_metadata(tmp_path: Path) -> None:
    changes: list[Callable[[gguf.GGUFWriter], None]] = [
        lambda w: None,
        lambda w: w.add_rope_freq_base(50_000.0),
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR) or w.add_rope_scaling_factor(2.0),
        lambda w: w.add_head_count_kv(2),
        lambda w: w.add_token_merges(["t 0"]),
        lambda w: w.add_name("other"),
    ]
    paths = [make(tmp_path / f"{i}.gguf", change) for i, change in enumerate(changes)]
    assert len({of(path) for path in paths}) == len(paths)


def test_how_it_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "model.gguf")
    seen = [of(path), of(path, executor="torch")]
    seen.append(of(path, executor="torch", cache=msgspec.to_builtins(CacheConfig(block_tokens=32))))
    seen.append(of(path, cache=msgspec.to_builtins(CacheConfig(kv_format="int8"))))
    # Another build of the kernels.
    build = tmp_path / "kernels.so"
    build.write_bytes(Path(_kernels.__file__).read_bytes() + b" ")
    monkeypatch.setattr(_kernels, "__file__", str(build))
    seen.append(of(path))
    assert len(set(seen)) == len(seen)


@pytest.mark.skipif(len(ISAS) < 2, reason="one kernel table")
def test_another_kernel_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "model.gguf")
    best = of(path)
    monkeypatch.setattr(_kernels, "isas", lambda: ISAS[-1:])
    assert of(path) != best


@pytest.mark.parametrize("size", [0, 1, 7, 8, 31, 32, 100, 4096, (256 << 10) - 1, (256 << 10) + 1, 3 << 20])
def test_digest(size: int) -> None:
    """Every bit counts, and the number of threads does not."""
    rng = np.random.default_rng(size)
    data = rng.integers(0, 256, size).astype(np.uint8)
    one, two = _kernels.ThreadPool(1), _kernels.ThreadPool(2)
    seen = {_kernels.digest(one, data)}
    assert seen == {_kernels.digest(two, data)}
    for flipped in rng.integers(0, max(size, 1), min(size, 50)).tolist():
        other = data.copy()
        other[flipped] ^= 1 << (flipped % 8)
        seen.add(_kernels.digest(two, other))
    assert len(seen) >= min(size, 50) * 0.6 and (size < 100 or len(seen) > 25)
    assert _kernels.digest(one, np.append(data, np.uint8(0))) not in seen


# ---- the size of the disk tier


def test_size_is_the_same_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "not there yet" / "kv"

    class Disk:
        f_frsize = 4096
        f_bavail = 1_000_000

    monkeypatch.setattr("os.statvfs", lambda path: Disk)
    size = own_size(folder)
    assert size == 409_600_000
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(bytes(10 << 20))
    used = (folder / "data").stat().st_blocks * 512
    Disk.f_bavail -= used // 4096
    assert abs(own_size(folder) - size) <= 4096
    Disk.f_bavail = 1 << 40
    assert own_size(folder) == MOST
