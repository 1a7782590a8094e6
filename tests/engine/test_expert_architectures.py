"""Every architecture with experts against `transformers`: small random checkpoints, written as GGUF."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import CHUNKS, LENGTHS, VOCAB, Driver, build, load, rounded_executor, theirs, torch_executor
from converters import convert
from expert_cases import CASES, write_smallthinker
from safetensors.torch import load_file, save_file

from ktransformers.engine import _kernels
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.models.decoder import compile_program
from ktransformers.engine.models.folder import open_folder
from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.program import Program

F32 = np.ndarray[Any, np.dtype[np.float32]]

@pytest.fixture(scope="module", params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Any:
    """What transformers builds."""
    return build(CASES[name])


@pytest.fixture(scope="module")
def program(name: str, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return load(convert(CASES[name], model, tmp_path_factory.mktemp("model") / "m.gguf"))[1]


@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]


@pytest.fixture(scope="module")
def expected(model: Any, sequences: list[Any]) -> list[F32]:
    return [theirs(model, s) for s in sequences]


@pytest.mark.parametrize("chunk", list(CHUNKS))
def test_torch(program: Program, sequences: list[Any], expected: list[F32], chunk: str) -> None:
    driver = Driver(torch_executor(program), sequences)
    for ours, reference in zip(driver.finish(CHUNKS[chunk]), expected, strict=True):
        assert np.abs(reference).max() > 1, "the logits of a test model should be worth comparing"
        np.testing.assert_allclose(ours, reference, rtol=0, atol=5e-5)


@pytest.mark.parametrize("isa", _kernels.isas())
def test_native(program: Program, sequences: list[Any], expected: list[F32], isa: str) -> None:
    """Both round to bfloat16 in attention, so what differs are numbers near the middle of two of those: for
    that a few rows choose another expert, and all the others are close."""
    executor = NativeExecutor(program, isa=isa, threads=2, blocks=24, max_tokens=256, max_rows=256)
    ours = Driver(executor, sequences).finish(CHUNKS["chunks"])
    oracle = Driver(rounded_executor(program), sequences).finish(CHUNKS["chunks"])
    off = np.concatenate([np.abs(a - b).max(axis=-1) for a, b in zip(ours, oracle, strict=True)])
    assert np.quantile(off, 0.75) < 1.5e-2
    assert np.mean(np.concatenate(ours).argmax(-1) == np.concatenate(oracle).argmax(-1)) > 0.95
    assert np.mean(np.concatenate(ours).argmax(-1) == np.concatenate(expected).argmax(-1)) > 0.9


@pytest.fixture(scope="module")
def folder(name: str, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint as transformers itself writes it."""
    path = tmp_path_factory.mktemp("folder")
    if name.startswith("smallthinker"):
        write_smallthinker(model, path)
    else:
        model.save_pretrained(path, max_shard_size="200KB")
    return path


def program_of(path: Path) -> Program:
    opened = open_folder(path)
    return compile_program(opened.spec, opened)


@pytest.mark.parametrize("chunk", ["whole", "chunks"])
def test_folder(folder: Path, sequences: list[Any], expected: list[F32], chunk: str) -> None:
    driver = Driver(torch_executor(program_of(folder)), sequences)
    for ours, reference in zip(driver.finish(CHUNKS[chunk]), expected, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=5e-5)


def test_folder_and_gguf_are_the_same_model(name: str, folder: Path, program: Program) -> None:
    """But for what a file cannot say, and for the order of rows in which Llama's rope is written."""
    ours = program_of(folder)
    assert [type(op) for op in ours.ops] == [type(op) for op in program.ops]
    assert ours.widths == program.widths and ours.cache == program.cache

    def shapes(p: Program) -> dict[str, tuple[int, int, int]]:
        """GGUF calls the norm of some models' MLPs after what stands before it."""
        return {
            t.name.replace("post_attention_norm", "ffn_norm"): (t.rows, t.cols, t.experts) for t in p.weights
        }

    assert shapes(ours) == shapes(program)


FOLDER_ONLY = {
    "llama4 with short chunks": (
        "llama4-scout",
        {"attention_chunk_size": 16, "floor_scale": 8, "attn_scale": 0.5, "num_experts_per_tok": 2},
    ),
    "qwen3moe with a dense layer": ("qwen3moe", {"mlp_only_layers": [1]}),
    "gpt-oss with other limits": ("gpt-oss", {"swiglu_limit": 0.5, "swiglu_alpha": 1.2}),
}


@pytest.mark.parametrize("what", list(FOLDER_ONLY))
def test_what_only_a_config_json_says(what: str, tmp_path: Path, sequences: list[Any]) -> None:
    name, changes = FOLDER_ONLY[what]
    case = CASES[name]
    model = build(replace(case, config={**case.config, **changes}))
    model.save_pretrained(tmp_path)
    program = program_of(tmp_path)
    native = NativeExecutor(program, threads=2, blocks=24, max_tokens=256, max_rows=256)
    exact, rounded, ours = (
        Driver(executor, sequences).finish(CHUNKS["chunks"])
        for executor in (torch_executor(program), rounded_executor(program), native)
    )
    for logits, s in zip(exact, sequences, strict=True):
        np.testing.assert_allclose(logits, theirs(model, s), rtol=0, atol=5e-5)
    off = np.concatenate([np.abs(a - b).max(-1) for a, b in zip(ours, rounded, strict=True)])
    assert np.quantile(off, 0.75) < 1.5e-2


@pytest.mark.parametrize("name", ["glm-4.5", "deepseek-v3"])
def test_heads_that_predict_further_tokens_are_not_read(name: str, tmp_path: Path) -> None:
    model = build(CASES[name])
    model.save_pretrained(tmp_path)
    before = program_of(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(64, 128)
    tensors["model.layers.3.input_layernorm.weight"] = torch.zeros(64)
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    assert program_of(tmp_path).ops == before.ops
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    with pytest.raises(ModelError, match=r"2 tensors are unknown"):
        program_of(tmp_path)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "more chosen than there are": ("mixtral", {"num_experts_per_tok": 7}, "num_experts_per_tok"),
    "groups that do not divide": ("deepseek-v3", {"n_group": 3}, "n_group"),
    "groups too small": ("deepseek-v3", {"n_group": 8, "topk_group": 2}, "n_group"),
    "another rule": ("deepseek-v2", {"topk_method": "best"}, "topk_method"),
    "another score": ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func"),
    "latent rows of another size": ("deepseek-v3", {"kv_lora_rank": 16}, "attn_kv_a_mqa|kv_b_proj"),
    "clipped keys": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
    "experts of another width": ("qwen3moe", {"moe_intermediate_size": 48}, "ffn_gate_exps"),
    "rope for other layers": ("llama4-scout", {"no_rope_layers": [1, 1]}, "no_rope_layers"),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_wrong_fields_are_named(what: str, tmp_path: Path) -> None:
    name, changes, named = WRONG[what]
    build(CASES[name]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=named):
        program_of(tmp_path)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    build(CASES["qwen3moe"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.up_proj.*expert 5 is missing"):
        program_of(tmp_path)


def test_greedy_text_is_that_of_a_full_recompute(program: Program, model: Any, sequences: list[Any]) -> None:
    """64 steps of four sequences that enter at different steps, each prompt in pieces of its own."""
    prompts = [s[:n] for s, n in zip(sequences, (50, 37, 5, 1), strict=True)]
    driver = Driver(torch_executor(program), prompts, room=64)
    drawn = [0] * len(prompts)
    step = 0
    while min(drawn) < 64:
        pieces = {}
        for s, sequence in enumerate(driver.sequences):
            left = len(sequence) - driver.done[s]
            if step >= 3 * s and drawn[s] < 64:
                pieces[s] = min(left, 7 + 6 * s)
        driver.step(pieces)
        for s in pieces:
            if driver.done[s] == len(driver.sequences[s]):
                token = np.int32(driver.logits[s][-1].argmax())
                driver.sequences[s] = np.append(driver.sequences[s], token)
                drawn[s] += 1
        step += 1
    for s, prompt in enumerate(prompts):
        tokens = driver.sequences[s]
        greedy = theirs(model, tokens).argmax(-1)
        assert tokens[len(prompt) :].tolist() == greedy[len(prompt) - 1 : -1].tolist()
