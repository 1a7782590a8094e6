"""Names of the tensors in a GGUF file of the llama family."""

from typing import Final

EMBED: Final = "token_embd.weight"
OUTPUT_NORM: Final = "output_norm.weight"
OUTPUT: Final = "output.weight"
"""Absent when the output is tied to the embedding."""
ROPE_FREQS: Final = "rope_freqs.weight"
"""F32 [dims / 2]: what each rope frequency is divided by (llama 3.1 context extension)."""

ATTN_NORM: Final = "attn_norm"
ATTN_Q: Final = "attn_q"
ATTN_K: Final = "attn_k"
ATTN_V: Final = "attn_v"
ATTN_Q_NORM: Final = "attn_q_norm"
ATTN_K_NORM: Final = "attn_k_norm"
ATTN_Q_A: Final = "attn_q_a"
ATTN_Q_A_NORM: Final = "attn_q_a_norm"
ATTN_Q_B: Final = "attn_q_b"
ATTN_KV_A: Final = "attn_kv_a_mqa"
"""[latent + rope, width] of multi-head latent attention."""
ATTN_KV_A_NORM: Final = "attn_kv_a_norm"
ATTN_K_B: Final = "attn_k_b"
"""[heads, latent, nope]"""
ATTN_V_B: Final = "attn_v_b"
"""[heads, value, latent]"""
ATTN_OUT: Final = "attn_output"
ATTN_POST_NORM: Final = "post_attention_norm"
ATTN_SINKS: Final = "attn_sinks"
FFN_NORM: Final = "ffn_norm"
FFN_GATE: Final = "ffn_gate"
FFN_UP: Final = "ffn_up"
FFN_DOWN: Final = "ffn_down"
FFN_POST_NORM: Final = "post_ffw_norm"

FFN_GATE_INP: Final = "ffn_gate_inp"
"""The router."""
EXP_PROBS_B: Final = "exp_probs_b"
"""A bias of the router's probabilities that only chooses."""
FFN_GATE_EXPS: Final = "ffn_gate_exps"
FFN_UP_EXPS: Final = "ffn_up_exps"
FFN_DOWN_EXPS: Final = "ffn_down_exps"
FFN_GATE_SHEXP: Final = "ffn_gate_shexp"
FFN_UP_SHEXP: Final = "ffn_up_shexp"
FFN_DOWN_SHEXP: Final = "ffn_down_shexp"
FFN_GATE_INP_SHEXP: Final = "ffn_gate_inp_shexp"
"""F32 [width]: the gate of the shared expert."""


def weight(layer: int, name: str) -> str:
    """Name of a layer's weight."""
    return f"blk.{layer}.{name}.weight"


def bias(layer: int, name: str) -> str:
    """Name of a layer's bias."""
    return f"blk.{layer}.{name}.bias"
