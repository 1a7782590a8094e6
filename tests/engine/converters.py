"""Writes a checkpoint of transformers as GGUF, with names, permutations and keys as llama.cpp has them."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from checkpoints import Case

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
POST_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
EXPERTS = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.router": "ffn_gate_inp",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
}


def permute(w: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k so that rope pairs (i, i + n / 2) become neighbours."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def llama3_divisors(head_dim: int, theta: float) -> np.ndarray[Any, Any]:
    """As the converter writes rope_freqs.weight."""
    old = LLAMA3["original_max_position_embeddings"]
    low, high, factor = (LLAMA3[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
    divisors = []
    for freq in theta ** (-np.arange(0, head_dim, 2) / head_dim):
        turns = old * freq / (2 * math.pi)  # type: ignore[operator]
        smooth = min(max((turns - low) / (high - low), 0), 1)  # type: ignore[operator]
        divisors.append(1 / ((1 - smooth) / factor + smooth))  # type: ignore[operator]
    return np.array(divisors, np.float32)


Named = Iterator[tuple[str, torch.Tensor]]


def expert_tensors(case: Case, leaf: str, p: torch.Tensor) -> Named:
    """transformers has gate and up as one, of some models with inputs first and rows that alternate."""
    kind = "bias" if leaf.endswith("_bias") else "weight"
    if case.arch in ("gpt-oss", "llama4") and kind == "weight":
        p = p.transpose(1, 2)
    if leaf.startswith("down"):
        yield f"ffn_down_exps.{kind}", p
        return
    gate, up = (p[:, 0::2], p[:, 1::2]) if case.arch == "gpt-oss" else p.chunk(2, dim=1)
    yield from ((f"ffn_gate_exps.{kind}", gate), (f"ffn_up_exps.{kind}", up))


def delta_tensors(c: Any, stem: str, leaf: str, p: torch.Tensor) -> Named:
    """Of Qwen3-Next's layers without attention: what lies head by head of keys is put in order, but for b and
    a."""
    if leaf == "A_log":
        yield "ssm_a", -p.exp()
    elif leaf == "dt_bias":
        yield "ssm_dt.bias", p
    elif stem.endswith("in_proj_qkvz"):
        values = c.linear_num_value_heads // c.linear_num_key_heads * c.linear_value_head_dim
        sizes = [c.linear_key_head_dim, c.linear_key_head_dim, values, values]
        parts = p.reshape(c.linear_num_key_heads, sum(sizes), -1).split(sizes, dim=1)
        *qkv, z = (part.reshape(-1, p.shape[-1]) for part in parts)
        yield from (("attn_qkv.weight", torch.cat(qkv)), ("attn_gate.weight", z))
    else:
        yield f"{EXPERTS[stem]}.{leaf}", p.squeeze(1) if stem.endswith("conv1d") else p


def layer_tensors(case: Case, config: Any, stem: str, leaf: str, p: torch.Tensor) -> Named:
    """One parameter of a layer under its name, or names, in GGUF."""
    names = {**NAMES, **EXPERTS, **(POST_NORMS if case.arch in ("gemma2", "gemma3") else {})}
    if case.arch in ("glm4moe", "gpt-oss", "qwen3next"):
        names["post_attention_layernorm"] = "post_attention_norm"
    if stem.endswith(".experts"):
        yield from expert_tensors(case, leaf, p)
        return
    if leaf == "sinks":
        yield "attn_sinks.weight", p
        return
    if leaf == "e_score_correction_bias":
        yield "exp_probs_b.bias", p
        return
    if stem == "self_attn.kv_b_proj":
        by_head = p.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
        k, v = by_head.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        yield from (("attn_k_b.weight", k.transpose(1, 2)), ("attn_v_b.weight", v))
        return
    if case.arch == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
        p = permute(p, config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads)
    if case.arch.startswith("gemma") and stem.endswith("norm"):
        p = p + 1
    if stem == "mlp.shared_expert_gate":
        p = p[0]
    if case.arch == "qwen3next":
        if stem.startswith("linear_attn"):
            yield from delta_tensors(config, stem, leaf, p)
            return
        if stem.endswith("norm"):
            p = p + 1
    yield f"{names[stem]}.{leaf}", p


def tensors(case: Case, model: Any, fused: bool) -> Named:
    config = model.config
    for name, p in model.state_dict().items():
        parts = name.removeprefix("model.").split(".")
        if fused and parts[-2] == "in_proj_qkvz":
            yield f"blk.{parts[1]}.ssm_in.weight", p
            continue
        if parts[0] == "layers":
            for ours, q in layer_tensors(case, config, ".".join(parts[2:-1]), parts[-1], p):
                yield f"blk.{parts[1]}.{ours}", q
        elif parts[0] != "lm_head" or not config.tie_word_embeddings:
            centred = case.arch.startswith("gemma") or case.arch == "qwen3next"
            plus = 1 if centred and parts[0] == "norm" else 0
            yield f"{NAMES[parts[0]]}.{parts[1]}", p + plus


def convert(case: Case, model: Any, path: Path, fused: bool = False) -> Path:
    """Write the checkpoint in F32. `fused`: with the delta rule's projections in one, as the first files of
    Qwen3-Next."""
    c = model.config
    w = gguf.GGUFWriter(path, case.arch)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    w.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    keys = {
        "block_count": c.num_hidden_layers,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
    }
    for key, value in {**keys, **case.keys}.items():
        add = {int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}
        {**add, bool: w.add_bool}[type(value)](f"{case.arch}.{key}", value)
    if case.config.get("rope_parameters", {}).get("rope_type") == "llama3":
        w.add_tensor("rope_freqs.weight", llama3_divisors(head_dim, 500_000.0))
    for name, p in tensors(case, model, fused):
        w.add_tensor(name, p.contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
