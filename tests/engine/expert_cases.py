"""Small architectures with experts, as `transformers` and as GGUF name them."""

import json
from pathlib import Path
from typing import Any

from checkpoints import Case, rope
from safetensors.torch import save_file

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


def write_smallthinker(model: Any, path: Path) -> None:
    """Each expert by itself, under the names of the published checkpoints."""
    c = model.config
    tensors = {}
    for name, p in model.state_dict().items():
        name = name.replace(".mlp.gate.", ".block_sparse_moe.primary_router.")
        if ".experts." not in name:
            tensors[name] = p
            continue
        stem = name.split(".mlp.")[0] + ".block_sparse_moe.experts"
        for e in range(c.experts):
            parts = zip(("gate", "up"), p[e].chunk(2), strict=True) if "gate" in name else [("down", p[e])]
            tensors |= {f"{stem}.{e}.{part}.weight": w.contiguous() for part, w in parts}
    save_file(tensors, path / "model.safetensors")
    layers = range(c.num_hidden_layers)
    config = {
        "model_type": "smallthinker",
        "moe_num_primary_experts": c.experts,
        "moe_num_active_primary_experts": c.top,
        "moe_ffn_hidden_size": c.intermediate_size,
        "moe_primary_router_apply_softmax": c.softmax,
        "rope_layout": [int(not c.window or layer % 4 > 0) for layer in layers],
        "sliding_window_layout": [int(c.window > 0 and layer % 4 > 0) for layer in layers],
        "sliding_window_size": c.window or 4096,
        **{key: getattr(c, key) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")},
        **{key: getattr(c, key) for key in ("num_key_value_heads", "head_dim", "max_position_embeddings")},
        **{key: getattr(c, key) for key in ("rms_norm_eps", "rope_theta", "vocab_size")},
    }
    (path / "config.json").write_text(json.dumps(config))
