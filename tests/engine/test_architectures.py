"""Every dense architecture against `transformers`: small random checkpoints, written as GGUF."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    CHUNKS,
    LENGTHS,
    VOCAB,
    Case,
    Driver,
    build,
    i32,
    load,
    rope,
    rounded_executor,
    torch_executor,
)
from converters import LLAMA3, convert

from ktransformers.engine import _kernels
from ktransformers.engine.batch import Batch
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.program import Program

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
GEMMA = {"head_dim": 32, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GEMMA3_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
}
QUERY_SCALE = {"query_pre_attn_scalar": 24}

CASES = {
    "llama": Case("llama", "Llama", rope(10_000.0), {"rope.freq_base": 10_000.0}),
    "llama-mha-tied": Case("llama", "Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa-bias": Case(
        "llama", "Llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}
    ),
    "llama-wide-heads": Case("llama", "Llama", {"head_dim": 32}),
    "llama-3.1": Case("llama", "Llama", rope(500_000.0, **LLAMA3), {"rope.freq_base": 500_000.0}),
    "llama-linear": Case(
        "llama",
        "Llama",
        rope(10_000.0, rope_type="linear", factor=4.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "mistral": Case("llama", "Mistral", {"sliding_window": None}),
    "mistral-window": Case("llama", "Mistral", {"sliding_window": 20}, {"attention.sliding_window": 20}),
    "qwen2": Case("qwen2", "Qwen2", rope(1e6), {"rope.freq_base": 1e6}),
    "qwen2-tied-yarn": Case(
        "qwen2",
        "Qwen2",
        {"tie_word_embeddings": True, **rope(1e6, **YARN)},
        {
            "rope.freq_base": 1e6,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    ),
    "qwen3": Case("qwen3", "Qwen3", {"head_dim": 32, **rope(1e6)}, {"rope.freq_base": 1e6}),
    "gemma": Case("gemma", "Gemma", {**GEMMA, "hidden_act": "gelu_pytorch_tanh", **rope(10_000.0)}),
    "gemma2": Case(
        "gemma2",
        "Gemma2",
        {
            **GEMMA,
            **QUERY_SCALE,
            "num_hidden_layers": 4,
            "sliding_window": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
        {
            "attention.sliding_window": 20,
            "attention.scale": 24**-0.5,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": Case(
        "gemma3",
        "Gemma3",
        {
            **GEMMA,
            **GEMMA3_ROPE,
            "query_pre_attn_scalar": 32,
            "num_hidden_layers": 7,
            "sliding_window": 20,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
        },
        {
            "attention.sliding_window": 20,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
    "gemma3-pattern": Case(
        "gemma3",
        "Gemma3",
        {
            **GEMMA,
            **QUERY_SCALE,
            "sliding_window": 32,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
            },
        },
        {
            "attention.sliding_window": 32,
            "attention.sliding_window_pattern": [False, True, False],
            "attention.scale": 24**-0.5,
            "final_logit_softcapping": 4.0,
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 20_000.0,
        },
    ),
}

@pytest.fixture(scope="module")
def sequences() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]


@pytest.fixture(scope="module", params=list(CASES))
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, sequences: list[Any]
) -> tuple[Program, list[np.ndarray[Any, Any]]]:
    """The compiled program of a case, and transformers' logits for every position of the sequences."""
    case = CASES[request.param]
    model = build(case)
    _, program = load(convert(case, model, tmp_path_factory.mktemp("model") / "m.gguf"))
    with torch.no_grad():
        logits = [model(torch.from_numpy(s)[None].long()).logits[0].numpy() for s in sequences]
    return program, logits


@pytest.mark.parametrize("chunk", list(CHUNKS))
def test_torch(checkpoint: tuple[Program, list[Any]], sequences: list[Any], chunk: str) -> None:
    program, expected = checkpoint
    driver = Driver(torch_executor(program), sequences)
    for ours, theirs in zip(driver.finish(CHUNKS[chunk]), expected, strict=True):
        assert np.abs(theirs).max() > 1, "the logits of a test model should be worth comparing"
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-5)


@pytest.mark.parametrize("isa", _kernels.isas())
@pytest.mark.parametrize("chunk", list(CHUNKS))
def test_native(checkpoint: tuple[Program, list[Any]], sequences: list[Any], chunk: str, isa: str) -> None:
    """Float32 weights are computed in float32: what differs is the bfloat16 of attention.

    With the same roundings in the oracle only those numbers differ that rounding decides.
    """
    program, expected = checkpoint
    executor = NativeExecutor(program, isa=isa, threads=2, blocks=24, max_tokens=256, max_rows=256)
    ours = Driver(executor, sequences).finish(CHUNKS[chunk])
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=5e-2)
    oracle = Driver(rounded_executor(program), sequences).finish(CHUNKS[chunk])
    for mine, theirs in zip(ours, oracle, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-2)


def test_only_rows_that_draw_are_computed_after_the_last_attention(tmp_path: Path) -> None:
    case = CASES["llama"]
    _, program = load(convert(case, build(case), tmp_path / "m.gguf"))
    rng = np.random.default_rng(3)
    tokens = i32(rng.integers(0, VOCAB, 20))
    some, every = i32([3, 19]), i32(range(20))
    batch = {"tokens": tokens, "starts": i32([0, 12, 20]), "context": i32([0, 0])}
    tables = {"block_starts": i32([0, 1, 2]), "blocks": i32([4, 2])}
    executor = torch_executor(program)
    whole = executor.logits(Batch(**batch, **tables, logit_rows=every))
    part = executor.logits(Batch(**batch, **tables, logit_rows=some))
    np.testing.assert_allclose(part, whole[some], rtol=0, atol=1e-5)
    assert executor.logits(Batch(**batch, **tables, logit_rows=i32([]))).shape == (0, VOCAB)
