"""Qwen3-Next against `transformers`: states beside KV, kept, copied, chunked and batched."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    CHUNKS,
    LENGTHS,
    QWEN3_NEXT,
    VOCAB,
    Driver,
    build,
    load,
    rounded_executor,
    theirs,
    torch_executor,
)
from converters import convert
from safetensors.torch import load_file, save_file

from ktransformers.engine import _kernels
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.load import open_model
from ktransformers.engine.models.decoder import compile_program
from ktransformers.engine.models.folder import open_folder
from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.plan import plan
from ktransformers.engine.program import Program, StateShape
from ktransformers.engine.weights.gguf import read
from ktransformers.kvcache.config import CacheConfig

F32 = np.ndarray[Any, np.dtype[np.float32]]
I32 = np.ndarray[Any, np.dtype[np.int32]]

TOLERANCE = 2e-4
"""theirs works in pieces of 64 tokens, and the norm of a result near zero makes roundings larger."""


@pytest.fixture(scope="module")
def model() -> Any:
    return build(QWEN3_NEXT)


@pytest.fixture(scope="module")
def gguf_path(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(QWEN3_NEXT, model, tmp_path_factory.mktemp("model") / "m.gguf")


@pytest.fixture(scope="module")
def program(gguf_path: Path) -> Program:
    return load(gguf_path)[1]


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    model.save_pretrained(path, max_shard_size="200KB")
    return path


@pytest.fixture(scope="module")
def sequences() -> list[I32]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]


@pytest.fixture(scope="module")
def expected(model: Any, sequences: list[I32]) -> list[F32]:
    return [theirs(model, s) for s in sequences]


def program_of(path: Path) -> Program:
    opened = open_folder(path)
    return compile_program(opened.spec, opened)


def native(program: Program, isa: str | None = None, threads: int = 2) -> NativeExecutor:
    return NativeExecutor(
        program, isa=isa, threads=threads, blocks=64, max_tokens=256, max_rows=256, states=12
    )


@pytest.mark.parametrize("chunk", list(CHUNKS))
@pytest.mark.parametrize("container", ["gguf", "folder"])
def test_torch(
    container: str, program: Program, folder: Path, sequences: list[I32], expected: list[F32], chunk: str
) -> None:
    if container == "folder":
        program = program_of(folder)
    driver = Driver(torch_executor(program), sequences)
    for ours, reference in zip(driver.finish(CHUNKS[chunk]), expected, strict=True):
        assert np.abs(reference).max() > 1, "the logits of a test model should be worth comparing"
        np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("isa", _kernels.isas())
def test_native(program: Program, sequences: list[I32], expected: list[F32], isa: str) -> None:
    """With the same roundings in the oracle a few rows choose another expert: all the others are close."""
    ours = Driver(native(program, isa), sequences).finish(CHUNKS["chunks"])
    oracle = Driver(rounded_executor(program), sequences).finish(CHUNKS["chunks"])
    off = np.concatenate([np.abs(a - b).max(axis=-1) for a, b in zip(ours, oracle, strict=True)])
    assert np.quantile(off, 0.75) < 6e-3
    assert np.mean(np.concatenate(ours).argmax(-1) == np.concatenate(expected).argmax(-1)) > 0.95


def test_folder_and_gguf_are_the_same_model(folder: Path, program: Program) -> None:
    ours = program_of(folder)
    assert [type(op) for op in ours.ops] == [type(op) for op in program.ops]
    assert ours.widths == program.widths
    assert (ours.cache, ours.state) == (program.cache, program.state)
    assert program.cache.layers == 1 and program.state == StateShape(4, 3, 216, 6, 24, 20)
    for a, b in zip(ours.weights, program.weights, strict=True):
        np.testing.assert_allclose(a.read().view(np.float32), b.read().view(np.float32), rtol=1e-6)


def test_an_older_gguf_file_has_all_of_a_projection_in_one(
    model: Any, program: Program, gguf_path: Path, tmp_path: Path, sequences: list[I32]
) -> None:
    """ssm_in, head by head of keys, as a checkpoint of Hugging Face has it."""
    old = convert(QWEN3_NEXT, model, tmp_path / "old.gguf", fused=True)
    assert "blk.0.ssm_in.weight" in read(old).tensors and "blk.0.attn_qkv.weight" not in read(old).tensors
    ours = load(old)[1]
    assert ours.ops == program.ops
    for a, b in zip(ours.weights, program.weights, strict=True):
        np.testing.assert_array_equal(a.read(), b.read(), err_msg=a.name)


def test_greedy_text_is_that_of_a_full_recompute(
    model: Any, program: Program, sequences: list[I32]
) -> None:
    """64 steps of four sequences that enter at different steps, each prompt in pieces of its own."""
    prompts = [s[:n] for s, n in zip(sequences, (50, 37, 5, 1), strict=True)]
    for executor in (torch_executor(program), native(program)):
        driver = Driver(executor, prompts, room=64)
        greedy(driver, 64)
        for s, prompt in enumerate(prompts):
            tokens = driver.sequences[s]
            if isinstance(executor, NativeExecutor):
                whole = Driver(native(program), [tokens]).finish(CHUNKS["whole"])[0]
                np.testing.assert_array_equal(np.stack(driver.logits[s]), whole[:-1])
            else:
                whole = theirs(model, tokens)
            assert tokens[len(prompt) :].tolist() == whole.argmax(-1)[len(prompt) - 1 : -1].tolist()


def greedy(driver: Driver, count: int) -> None:
    drawn = [0] * len(driver.sequences)
    step = 0
    while min(drawn) < count:
        pieces = {}
        for s, sequence in enumerate(driver.sequences):
            left = len(sequence) - driver.done[s]
            if step >= 3 * s and drawn[s] < count:
                pieces[s] = min(left, 7 + 6 * s)
        driver.step(pieces)
        for s in pieces:
            if driver.done[s] == len(driver.sequences[s]):
                token = np.int32(driver.logits[s][-1].argmax())
                driver.sequences[s] = np.append(driver.sequences[s], token)
                drawn[s] += 1
        step += 1


@pytest.mark.parametrize("chunk", list(CHUNKS))
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_chunks_threads_and_neighbours(
    program: Program, sequences: list[I32], chunk: str, threads: int
) -> None:
    together = Driver(native(program, threads=threads), sequences, seed=3).finish(CHUNKS[chunk])
    for s, sequence in enumerate(sequences):
        alone = Driver(native(program), [sequence]).finish(CHUNKS["whole"])[0]
        np.testing.assert_array_equal(together[s], alone)


WRONG_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "heads of values": ({"linear_num_value_heads": 3}, "linear_num_value_heads"),
    "no heads of keys": ({"linear_num_key_heads": 0}, "linear_num_key_heads"),
    "more heads of keys": ({"linear_num_key_heads": 3}, "ssm_in|in_proj_qkvz"),
    "huge heads": ({"linear_key_head_dim": 2**40}, "linear_key_head_dim"),
    "other heads": ({"linear_value_head_dim": 24}, "ssm_in"),
    "taps": ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
    "other taps": ({"linear_conv_kernel_dim": 3}, "ssm_conv1d"),
    "no attention": ({"layer_types": ["linear_attention"] * 5}, "layer_types"),
    "another kind": ({"layer_types": ["full_attention"] * 4 + ["sliding_attention"]}, "layer_types"),
    "too few kinds": ({"layer_types": ["full_attention"]}, "layer_types"),
    "attention elsewhere": ({"layer_types": ["full_attention"] * 5}, "blk.0.attn_q.weight.*missing"),
    "a window": ({"use_sliding_window": True}, "use_sliding_window"),
}


@pytest.mark.parametrize("what", list(WRONG_FIELDS))
def test_wrong_fields_are_named(what: str, folder: Path, tmp_path: Path) -> None:
    changes, named = WRONG_FIELDS[what]
    copied(folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=named):
        program_of(tmp_path)


def copied(folder: Path, to: Path) -> None:
    for file in folder.iterdir():
        (to / file.name).hardlink_to(file)
    (to / "config.json").unlink()


def test_what_config_json_leaves_out_is_the_architectures(folder: Path, tmp_path: Path) -> None:
    """As the published files have it: no layer_types, and rope's fields at the top."""
    copied(folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for name in ("layer_types", "rope_parameters"):
        del config[name]
    config |= {"rope_theta": 1e6, "rope_scaling": None, "full_attention_interval": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert program_of(tmp_path).ops == program_of(folder).ops


WRONG_KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "heads of values": ({"ssm.time_step_rank": 5}, "ssm.time_step_rank"),
    "values": ({"ssm.inner_size": 121}, "ssm.inner_size"),
    "huge values": ({"ssm.inner_size": 6 * 1024}, "ssm.inner_size"),
    "keys": ({"ssm.state_size": 0}, "ssm.state_size"),
    "taps": ({"ssm.conv_kernel": 17}, "ssm.conv_kernel"),
    "other taps": ({"ssm.conv_kernel": 5}, "ssm_conv1d"),
    "no attention": ({"full_attention_interval": 6}, "full_attention_interval"),
    "another attention": ({"full_attention_interval": 3}, "attn_qkv|attn_q"),
}


@pytest.mark.parametrize("what", list(WRONG_KEYS))
def test_wrong_keys_are_named(what: str, model: Any, tmp_path: Path) -> None:
    changes, named = WRONG_KEYS[what]
    case = replace(QWEN3_NEXT, keys={**QWEN3_NEXT.keys, **changes})
    with pytest.raises(ModelError, match=named):
        load(convert(case, model, tmp_path / "m.gguf"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 200.0])
def test_decays_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    """200: the exponential is infinite."""
    wrong = build(QWEN3_NEXT)
    with torch.no_grad():
        wrong.model.layers[1].linear_attn.A_log[2] = value
    wrong.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"blk\.1\.ssm_a.*not finite"):
        program_of(tmp_path)
    with pytest.raises(ModelError, match=r"blk\.1\.ssm_a.*not finite"):
        load(convert(QWEN3_NEXT, wrong, tmp_path / "m.gguf"))


def test_heads_that_predict_further_tokens_are_not_read(folder: Path, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["mtp.fc.weight"] = torch.zeros(64, 128)
    tensors["mtp.layers.0.input_layernorm.weight"] = torch.zeros(64)
    save_file(tensors, tmp_path / "model.safetensors")
    assert program_of(tmp_path).ops == program_of(folder).ops
    tensors["model.layers.0.linear_attn.new.weight"] = torch.zeros(64)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 tensors are unknown"):
        program_of(tmp_path)


def test_the_plan_counts_states_and_refuses_tiers_by_name(gguf_path: Path) -> None:
    config = EngineConfig(model=str(gguf_path), max_sequences=3)
    program, facts = open_model(config)
    planned = plan(config, program, facts, 10**9)
    assert planned.states == 6
    assert program.state is not None
    assert ("states, 6", 6 * 4 * program.state.elements) in planned.needs
    no_reuse = EngineConfig(model=str(gguf_path), max_sequences=3, cache=CacheConfig(prefix_reuse=False))
    assert plan(no_reuse, program, facts, 10**9).states == 3
    for name in ("host_bytes", "disk_bytes"):
        tiers = EngineConfig(model=str(gguf_path), cache=CacheConfig(**{name: 10**6}))  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=rf"cache\.{name}"):
            plan(tiers, program, facts, 10**9)
