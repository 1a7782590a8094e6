"""Qwen3-Next from a config.json, and its tensors as the decoder asks for them."""

import re
from dataclasses import replace
from typing import Final

import numpy as np

from ktransformers.engine.models.config_json import Config
from ktransformers.engine.models.fields import (
    MAX_FFN,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_TAPS,
    brief,
)
from ktransformers.engine.models.huggingface_base import Read, act_of, base
from ktransformers.engine.models.huggingface_experts import qwen_experts
from ktransformers.engine.models.spec import DeltaSpec, ModelError
from ktransformers.engine.program import Pieces
from ktransformers.engine.weights import names
from ktransformers.engine.weights.formats import F32, as_floats
from ktransformers.engine.weights.stored import Stored

_DECAY: Final = re.compile(r"model\.layers\.(\d{1,5})\.linear_attn\.A_log", re.ASCII)
_CONV: Final = ".linear_attn.conv1d.weight"
_BIAS: Final = ".linear_attn.dt_bias"
_FURTHER_TOKENS: Final = "mtp."
"""The head that predicts further tokens, which is not used."""


def qwen3_next(c: Config) -> Read:
    """families.qwen says what it is. Its norms multiply by 1 + weight, but for that of the delta rule."""
    read = base(c, head_dim=256, partial=0.25)
    c.refuse("use_sliding_window", False)
    experts = replace(
        qwen_experts(c, read.spec.layers, 512, 512, 10, normalise=True),
        shared_ffn=c.integer("shared_expert_intermediate_size", 1, MAX_FFN, 512),
        shared_gate=True,
    )
    spec = replace(
        read.spec,
        act=act_of(c),
        qk_norm="head",
        gated_attention=True,
        delta=_delta(c, read.spec.layers),
        moe=experts,
    )
    return replace(read, spec=spec)


def _delta(c: Config, layers: int) -> DeltaSpec:
    k_heads = c.integer("linear_num_key_heads", 1, MAX_HEADS, 16)
    v_heads = c.integer("linear_num_value_heads", 1, MAX_HEADS, 32)
    if v_heads % k_heads:
        what = f"{k_heads} heads of keys do not divide {v_heads} of values"
        raise c.error("linear_num_value_heads", what)
    return DeltaSpec(
        layers=_layers(c, layers),
        k_heads=k_heads,
        v_heads=v_heads,
        k_dim=c.integer("linear_key_head_dim", 1, MAX_HEAD_DIM, 128),
        v_dim=c.integer("linear_value_head_dim", 1, MAX_HEAD_DIM, 128),
        taps=c.integer("linear_conv_kernel_dim", 2, MAX_TAPS, 4),
    )


def _layers(c: Config, layers: int) -> tuple[bool, ...]:
    every = c.integer("full_attention_interval", 1, MAX_LAYERS, 4)
    kinds = c.texts("layer_types")
    if kinds is None:
        kinds = ["linear_attention" if (n + 1) % every else "full_attention" for n in range(layers)]
    if len(kinds) != layers:
        raise c.error("layer_types", f"{len(kinds)} kinds for {layers} layers")
    if unknown := set(kinds) - {"linear_attention", "full_attention"}:
        raise c.error("layer_types", f"{brief(min(unknown))} is not supported")
    if "full_attention" not in kinds:
        raise c.error("layer_types", f"none of {layers} layers has attention")
    return tuple(kind == "linear_attention" for kind in kinds)


def delta_tensor(name: str, tensor: Stored) -> tuple[str, Stored] | None:
    """A tensor under the name, and in the shape, that `models.folder` knows; None for what is not used."""
    if name.startswith(_FURTHER_TOKENS):
        return None
    if match := _DECAY.fullmatch(name):
        return names.ssm_a(int(match[1])), _decay(name, tensor)
    if name.endswith(_BIAS):
        return name.removesuffix("_bias") + ".bias", tensor
    if name.endswith(_CONV) and len(tensor.shape) == 3 and tensor.shape[1] == 1:
        return name, replace(tensor, shape=(tensor.shape[0], tensor.shape[2]))
    return name, tensor


def _decay(name: str, tensor: Stored) -> Stored:
    """-exp of what is stored, which is a logarithm."""
    values = None if isinstance(tensor.data, Pieces) else as_floats(tensor.data, tensor.format)
    if values is None:
        raise ModelError(f"tensor '{name}' has format {tensor.format}; F32, F16 or BF16 is expected")
    with np.errstate(over="ignore"):
        decay = -np.exp(values)
    return Stored(F32, tensor.shape, decay.nbytes, decay.view(np.uint8))
