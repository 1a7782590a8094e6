"""DeepSeek V2 and V3 / R1, and Kimi K2 (https://arxiv.org/abs/2405.04434, 2412.19437, 2507.20534)."""

import math
from dataclasses import replace

from ktransformers.engine.models.families.base import layers_of, moe, rope_of
from ktransformers.engine.models.fields import MAX_CONTEXT, MAX_FFN, MAX_HEAD_DIM, MAX_HEADS, MAX_WIDTH
from ktransformers.engine.models.keys import Keys
from ktransformers.engine.models.spec import MlaSpec, ModelSpec


def deepseek2(keys: Keys) -> ModelSpec:
    """Latent attention; a shared expert; softmax routing by groups (V2), or sigmoid with a correction (V3).

    Keys of V2 and V3 are the same. YaRN's sharpening is part of the scale of scores (the square of what it
    would do to queries and to keys), so rope itself has none.
    """
    layers, unused = layers_of(keys)
    heads = keys.integer("attention.head_count", 1, MAX_HEADS)
    mla = _mla(keys)
    experts = moe(keys, layers)
    # The converter writes the key only when it is true.
    experts = replace(experts, normalise=keys.flag("expert_weights_norm", default=False))
    rope = rope_of(keys, mla.rope, interleaved=True)
    multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0, 10.0, 0.0)
    sharp = 1.0
    if rope.yarn is not None:
        sharp = 1.0 + multiplier * math.log(max(rope.yarn.factor, 1.0))
        rope = replace(rope, yarn=replace(rope.yarn, attention_factor=1.0))
    keys.refuse("attention.causal", True)
    return ModelSpec(
        architecture="deepseek2",
        layers=layers,
        width=keys.integer("embedding_length", 1, MAX_WIDTH),
        heads=heads,
        kv_heads=1,
        head_dim=mla.nope + mla.rope,
        ffn=keys.integer("feed_forward_length", 1, MAX_FFN),
        context=keys.integer("context_length", 1, MAX_CONTEXT),
        eps=keys.number("attention.layer_norm_rms_epsilon", 1e-12, 0.1),
        rope=rope,
        attention_scale=sharp * sharp * (mla.nope + mla.rope) ** -0.5,
        windows=(0,) * layers,
        moe=replace(experts, correction=experts.score == "sigmoid"),
        mla=mla,
        unused_layers=unused,
    )


def _mla(keys: Keys) -> MlaSpec:
    if keys.get("attention.key_length_mla") is None:
        what = "is missing: the file was converted before there was latent attention; convert it again"
        raise keys.error("attention.key_length_mla", what)
    latent = keys.integer("attention.kv_lora_rank", 1, MAX_WIDTH)
    rope = keys.integer("rope.dimension_count", 2, MAX_HEAD_DIM)
    head = keys.integer("attention.key_length_mla", rope + 1, MAX_HEAD_DIM)
    for name, size in (("head_count_kv", 1), ("key_length", latent + rope), ("value_length", latent)):
        if keys.integer(f"attention.{name}", 1, MAX_WIDTH) != size:
            raise keys.error(f"attention.{name}", f"is not {size}, as latent attention needs it")
    return MlaSpec(
        q_rank=keys.integer("attention.q_lora_rank", 0, MAX_WIDTH, 0),
        latent=latent,
        nope=head - rope,
        rope=rope,
        value=keys.integer("attention.value_length_mla", 1, MAX_HEAD_DIM),
    )
