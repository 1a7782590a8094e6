"""Every architecture with experts against `transformers`: small random checkpoints, written as GGUF."""

from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import CHUNKS, LENGTHS, VOCAB, Case, Driver, build, load, rope, torch_executor
from converters import convert

from ktransformers.engine import _kernels
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.program import Program

F32 = np.ndarray[Any, np.dtype[np.float32]]

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN_KEYS = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}


def deepseek(model: str, config: dict[str, Any], keys: dict[str, Any]) -> Case:
    """Latent rows of 32 + 16; heads of 24 + 16, and of 20 for values; the first of three layers is dense."""
    return Case(
        "deepseek2",
        model,
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 16,
            "v_head_dim": 20,
            "head_dim": 16,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            **config,
        },
        {
            "expert_count": 8,
            "expert_used_count": 3,
            "expert_feed_forward_length": 32,
            "expert_shared_count": 2,
            "leading_dense_block_count": 1,
            "expert_gating_func": 1,
            "attention.kv_lora_rank": 32,
            "attention.head_count_kv": 1,
            "attention.key_length": 48,
            "attention.value_length": 32,
            "attention.key_length_mla": 40,
            "attention.value_length_mla": 20,
            "rope.dimension_count": 16,
            **keys,
        },
    )


CASES = {
    "mixtral": Case(
        "llama",
        "Mixtral",
        {"num_local_experts": 6, "num_experts_per_tok": 2, **rope(1e6)},
        {"expert_count": 6, "expert_used_count": 2, "rope.freq_base": 1e6},
    ),
    "qwen2moe": Case(
        "qwen2moe",
        "Qwen2Moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            **rope(1e6),
        },
        {
            "expert_count": 8,
            "expert_used_count": 3,
            "expert_feed_forward_length": 32,
            "expert_shared_feed_forward_length": 48,
            "rope.freq_base": 1e6,
        },
    ),
    "qwen3moe": Case(
        "qwen3moe",
        "Qwen3Moe",
        {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "head_dim": 32,
            "norm_topk_prob": True,
            **rope(1e6),
        },
        {
            "expert_count": 16,
            "expert_used_count": 4,
            "expert_feed_forward_length": 32,
            "rope.freq_base": 1e6,
        },
    ),
}

CASES |= {
    "olmoe": Case(
        "olmoe",
        "Olmoe",
        {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 32, "norm_topk_prob": False},
        {"expert_count": 8, "expert_used_count": 3},
    ),
    "deepseek-v2-lite": deepseek("DeepseekV2", {"q_lora_rank": None, "routed_scaling_factor": 1.0}, {}),
    "deepseek-v2": deepseek(
        "DeepseekV2",
        {
            "q_lora_rank": 48,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 4.0,
            **rope(10_000.0, **YARN, mscale=0.7, mscale_all_dim=0.7),
        },
        {
            "attention.q_lora_rank": 48,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "expert_weights_scale": 4.0,
            **YARN_KEYS,
            "rope.scaling.yarn_log_multiplier": 0.07,
        },
    ),
    "deepseek-v3": deepseek(
        "DeepseekV3",
        {
            "q_lora_rank": 48,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            **rope(10_000.0, **YARN, mscale=1.0, mscale_all_dim=1.0),
        },
        {
            "attention.q_lora_rank": 48,
            "expert_group_count": 4,
            "expert_group_used_count": 2,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            **YARN_KEYS,
            "rope.scaling.yarn_log_multiplier": 0.1,
        },
    ),
    "kimi-k2": deepseek(
        "DeepseekV3",
        {
            "q_lora_rank": 32,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "norm_topk_prob": True,
            "n_routed_experts": 12,
            **rope(50_000.0),
        },
        {
            "attention.q_lora_rank": 32,
            "expert_count": 12,
            "expert_weights_scale": 2.827,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            "rope.freq_base": 50_000.0,
        },
    ),
}

GLM_CONFIG = {
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}
GLM_KEYS = {
    "expert_count": 8,
    "expert_used_count": 3,
    "expert_feed_forward_length": 32,
    "expert_shared_count": 1,
    "leading_dense_block_count": 1,
    "expert_gating_func": 2,
    "expert_weights_scale": 1.5,
    "expert_weights_norm": True,
    "rope.dimension_count": 8,
    "rope.freq_base": 1e6,
}
CASES |= {
    "glm-4.5": Case(
        "glm4moe", "Glm4Moe", {**GLM_CONFIG, "attention_bias": True, "use_qk_norm": True}, GLM_KEYS
    ),
    "glm-4.5-air": Case(
        "glm4moe", "Glm4Moe", {**GLM_CONFIG, "attention_bias": True, "use_qk_norm": False}, GLM_KEYS
    ),
    "gpt-oss": Case(
        "gpt-oss",
        "GptOss",
        {
            "head_dim": 16,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 32,
            "sliding_window": 20,
            **rope(150_000.0, **{**YARN, "factor": 8.0}, truncate=False),
        },
        {
            "expert_count": 8,
            "expert_used_count": 3,
            "expert_feed_forward_length": 32,
            "attention.sliding_window": 20,
            "rope.freq_base": 150_000.0,
            **YARN_KEYS,
            "rope.scaling.factor": 8.0,
        },
    ),
    "llama4-scout": Case(
        "llama4",
        "Llama4",
        {
            "head_dim": 16,
            "num_hidden_layers": 5,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "use_qk_norm": True,
            **rope(500_000.0),
        },
        {
            "feed_forward_length": 96,
            "expert_count": 4,
            "expert_used_count": 1,
            "expert_feed_forward_length": 32,
            "interleave_moe_layer_step": 1,
            "rope.freq_base": 500_000.0,
        },
    ),
    "llama4-maverick": Case(
        "llama4",
        "Llama4",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "num_local_experts": 128,
            "num_experts_per_tok": 1,
            "intermediate_size": 16,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": False,
            **rope(500_000.0),
        },
        {
            "feed_forward_length": 96,
            "expert_count": 128,
            "expert_used_count": 1,
            "expert_feed_forward_length": 16,
            "interleave_moe_layer_step": 2,
            "rope.freq_base": 500_000.0,
        },
    ),
}


def smallthinker(window: int, softmax: bool) -> Case:
    return Case(
        "smallthinker",
        "SmallThinker",
        {
            "head_dim": 16,
            "num_hidden_layers": 5,
            "experts": 8,
            "top": 3,
            "intermediate_size": 32,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "window": window,
            "softmax": softmax,
        },
        {
            "expert_count": 8,
            "expert_used_count": 3,
            "expert_feed_forward_length": 32,
            "expert_gating_func": 1 if softmax else 2,
            "rope.freq_base": 1e6,
            **({"attention.sliding_window": window} if window else {}),
        },
    )


CASES |= {
    "smallthinker-4b": smallthinker(0, softmax=False),
    "smallthinker-21b": smallthinker(20, softmax=True),
}


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


def theirs(model: Any, tokens: np.ndarray[Any, Any]) -> F32:
    """transformers' logits of every position."""
    with torch.no_grad():
        out: F32 = model(torch.from_numpy(tokens)[None].long(), use_cache=False).logits[0].numpy()
    return out


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
    """With keys and values in float16 a few rows choose another expert: all the others are close."""
    try:
        executor = NativeExecutor(program, isa=isa, threads=2, blocks=24, max_tokens=256, max_rows=256)
    except ValueError as error:
        pytest.skip(f"the native executor cannot run it: {error}")
    ours = Driver(executor, sequences).finish(CHUNKS["chunks"])
    off = np.concatenate([np.abs(a - b).max(axis=-1) for a, b in zip(ours, expected, strict=True)])
    assert np.quantile(off, 0.75) < 6e-3
    assert np.mean(np.concatenate(ours).argmax(-1) == np.concatenate(expected).argmax(-1)) > 0.95


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
