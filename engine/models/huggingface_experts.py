"""Architectures with experts from a config.json; the mathematics of each is said in families/."""

from dataclasses import replace
from typing import Final, Literal

from ktransformers.engine.models.config_json import Config
from ktransformers.engine.models.families import gpt_oss as oss
from ktransformers.engine.models.families import llama4 as scout
from ktransformers.engine.models.fields import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_FFN,
    MAX_HEAD_DIM,
    MAX_LAYERS,
    MAX_WIDTH,
    brief,
)
from ktransformers.engine.models.huggingface_base import Read, act_of, base, qwen_windows, windows_of
from ktransformers.engine.models.spec import MlaSpec, ModelSpec, MoeSpec, sharpening

_SCORES: Final[dict[str, Literal["softmax", "sigmoid"]]] = {"softmax": "softmax", "sigmoid": "sigmoid"}


def _with(read: Read, **changes: object) -> Read:
    return replace(read, spec=replace(read.spec, **changes))  # type: ignore[arg-type]


def _moe(c: Config, layers: int, ffn: int, experts: int, top: int, normalise: bool) -> MoeSpec:
    """Experts in all layers, chosen by a softmax. Arguments but `layers` are defaults."""
    count = c.integer("num_local_experts", 1, MAX_EXPERTS, c.integer("num_experts", 1, MAX_EXPERTS, experts))
    c.refuse("n_shared_experts", 0)
    return MoeSpec(
        layers=(True,) * layers,
        experts=count,
        top=c.integer("num_experts_per_tok", 1, count, top),
        ffn=c.integer("moe_intermediate_size", 1, MAX_FFN, ffn),
        act=act_of(c),
        normalise=c.flag("norm_topk_prob", normalise),
    )


def mixtral(c: Config) -> Read:
    read = base(c, rope_base=1e6)
    layers = read.spec.layers
    experts = _moe(c, layers, read.spec.ffn, 8, 2, normalise=True)
    windows = windows_of(c, layers, lambda _: True, None) if c.has("sliding_window") else (0,) * layers
    return _with(read, act=act_of(c), windows=windows, moe=experts)


def _sparse_layers(c: Config, layers: int) -> tuple[bool, ...]:
    """Qwen's rule of which layers have experts."""
    step = c.integer("decoder_sparse_step", 1, MAX_LAYERS, 1)
    dense = c.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise c.error("mlp_only_layers", f"{brief(dense)} is not an array of integers")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def qwen2_moe(c: Config) -> Read:
    read = base(c)
    layers = read.spec.layers
    c.get("qkv_bias")  # which biases there are is seen from the tensors
    experts = replace(
        qwen_experts(c, layers, 1408, 60, 4, normalise=False),
        shared_ffn=c.integer("shared_expert_intermediate_size", 1, MAX_FFN, 5632),
        shared_gate=True,
    )
    return _with(read, act=act_of(c), windows=qwen_windows(c, read), moe=experts)


def qwen_experts(c: Config, layers: int, ffn: int, experts: int, top: int, normalise: bool) -> MoeSpec:
    """Qwen's experts in those layers that have them. Arguments but `layers` are defaults."""
    return replace(_moe(c, layers, ffn, experts, top, normalise), layers=_sparse_layers(c, layers))


def qwen3_moe(c: Config) -> Read:
    read = base(c, head_dim=128)
    experts = qwen_experts(c, read.spec.layers, 768, 128, 8, normalise=False)
    return _with(read, act=act_of(c), qk_norm="head", windows=qwen_windows(c, read), moe=experts)


def olmoe(c: Config) -> Read:
    read = base(c)
    c.refuse("clip_qkv")
    experts = _moe(c, read.spec.layers, read.spec.ffn, 64, 8, normalise=False)
    return _with(read, act=act_of(c), qk_norm="row", moe=experts)


def _deepseek_moe(c: Config, spec: ModelSpec, experts: int, normalise: bool) -> MoeSpec:
    """Of DeepSeek and GLM. Softmax routing has no correction, and may have no groups."""
    count = c.integer("num_local_experts", 1, MAX_EXPERTS, experts)
    count = c.integer("n_routed_experts", 1, MAX_EXPERTS, count)
    top = c.integer("num_experts_per_tok", 1, count, 8)
    method = c.text("topk_method", "noaux_tc" if normalise else "greedy")
    if method not in ("noaux_tc", "greedy", "group_limited_greedy"):
        raise c.error("topk_method", f"{brief(method)} is not supported")
    score = c.text("scoring_func", "sigmoid" if method == "noaux_tc" else "softmax")
    if _SCORES.get(score) != ("sigmoid" if method == "noaux_tc" else "softmax"):
        raise c.error("scoring_func", f"{brief(score)} is not supported with {method}")
    groups = c.integer("n_group", 1, count, 1)
    top_groups = c.integer("topk_group", 1, groups, groups)
    if method == "greedy":
        groups = top_groups = 1
    if count % groups or top > count // groups * top_groups or (groups > 1 and count == groups):
        raise c.error("n_group", f"{groups} groups do not fit {top} of {count} experts")
    c.refuse("moe_layer_freq", 1)
    dense = c.integer("first_k_dense_replace", 0, MAX_LAYERS, 0)
    ffn = c.integer("moe_intermediate_size", 1, MAX_FFN, 1407)
    return MoeSpec(
        layers=tuple(layer >= dense for layer in range(spec.layers)),
        experts=count,
        top=top,
        ffn=ffn,
        act=act_of(c),
        score=_SCORES[score],
        normalise=c.flag("norm_topk_prob", normalise),
        scale=c.number("routed_scaling_factor", 1e-6, 1e3, 1.0),
        groups=groups,
        top_groups=top_groups,
        group_score="top2" if score == "sigmoid" else "max",
        correction=score == "sigmoid",
        shared_ffn=ffn * c.integer("n_shared_experts", 0, MAX_EXPERTS, 0),
    )


def _deepseek(c: Config, experts: int, normalise: bool) -> Read:
    mla = MlaSpec(
        q_rank=c.integer("q_lora_rank", 1, MAX_WIDTH, 0),
        latent=c.integer("kv_lora_rank", 1, MAX_WIDTH, 512),
        nope=c.integer("qk_nope_head_dim", 1, MAX_HEAD_DIM, 128),
        rope=c.integer("qk_rope_head_dim", 2, MAX_HEAD_DIM, 64),
        value=c.integer("v_head_dim", 1, MAX_HEAD_DIM, 128),
    )
    read = base(c, head_dim=mla.rope)
    if read.spec.head_dim != mla.rope:
        raise c.error("head_dim", f"is not qk_rope_head_dim, {mla.rope}")
    head_dim = mla.nope + mla.rope
    c.refuse("qk_head_dim", head_dim)
    scale = head_dim**-0.5 * sharpening_of_scores(c, read) ** 2
    rope = replace(read.spec.rope, interleaved=c.flag("rope_interleave", True))
    return _with(
        read,
        act=act_of(c),
        kv_heads=1,
        head_dim=head_dim,
        attention_scale=scale,
        rope=rope,
        mla=mla,
        unused_layers=c.integer("num_nextn_predict_layers", 0, MAX_LAYERS, 0),
        moe=_deepseek_moe(c, read.spec, experts, normalise),
    )


def sharpening_of_scores(c: Config, read: Read) -> float:
    """What mscale_all_dim says of queries and of keys; `base` has checked it."""
    section = c.get("rope_parameters") or c.get("rope_scaling")
    yarn = read.spec.rope.yarn
    strength = section.get("mscale_all_dim") if isinstance(section, dict) else None
    if yarn is None or not isinstance(strength, int | float) or not strength:
        return 1.0
    return sharpening(yarn.factor, strength)


def deepseek_v2(c: Config) -> Read:
    return _deepseek(c, 64, normalise=False)


def deepseek_v3(c: Config) -> Read:
    """Kimi K2's files are the same."""
    return _deepseek(c, 256, normalise=True)


def glm4_moe(c: Config) -> Read:
    read = base(c, head_dim=128)
    return _with(
        read,
        act=act_of(c),
        qk_norm="head" if c.flag("use_qk_norm", False) else "none",
        unused_layers=c.integer("num_nextn_predict_layers", 0, MAX_LAYERS, 0),
        moe=_deepseek_moe(c, read.spec, 128, normalise=True),
    )


def gpt_oss(c: Config) -> Read:
    read = base(c, head_dim=64, rope_base=150_000.0)
    experts = oss.clamped(_moe(c, read.spec.layers, read.spec.ffn, 128, 4, normalise=False))
    c.get("experts_per_token")  # says the same as num_experts_per_tok
    c.get("initial_context_length")
    alpha = c.number("swiglu_alpha", 0.0, 1e3, oss.ALPHA)
    limit = c.number("swiglu_limit", 0.0, 1e6, oss.LIMIT)
    return _with(
        read,
        windows=windows_of(c, read.spec.layers, lambda layer: layer % 2 == 0, 128),
        qkv_bias=True,
        sinks=True,
        moe=replace(experts, alpha=alpha, limit=limit),
    )


def llama4(c: Config) -> Read:
    """The text model. Layers without rope are those of no_rope_layers that say 0."""
    read = base(c, head_dim=128, rope_base=500_000.0)
    layers = read.spec.layers
    experts = _moe(c, layers, read.spec.ffn, 16, 1, normalise=False)
    step = c.integer("interleave_moe_layer_step", 1, MAX_LAYERS, 1)
    where = _integers(c, "moe_layers", list(range(step - 1, layers, step)))
    every = c.integer("no_rope_layer_interval", 1, MAX_LAYERS, scout.NOPE_EVERY)
    roped = _integers(c, "no_rope_layers", [int((layer + 1) % every != 0) for layer in range(layers)])
    if len(roped) != layers:
        raise c.error("no_rope_layers", f"{len(roped)} numbers for {layers} layers")
    c.get("layer_types")  # chunks go with rope
    c.get("for_llm_compressor")
    tuned = c.flag("attn_temperature_tuning", True)
    span = c.integer("floor_scale", 1, MAX_CONTEXT, scout.SPAN)
    scale = c.number("attn_scale", 0.0, 1e3, scout.SCALE)
    return _with(
        read,
        act=act_of(c),
        ffn=c.integer("intermediate_size_mlp", 1, MAX_FFN, 16384),
        rope=replace(read.spec.rope, interleaved=True),
        nope=tuple(not flag for flag in roped),
        chunk=c.integer("attention_chunk_size", 0, MAX_CONTEXT, 0),
        temperature=(span, scale) if tuned else None,
        unit_qk=c.flag("use_qk_norm", True),
        moe=replace(
            experts,
            layers=tuple(layer in where for layer in range(layers)),
            score="sigmoid",
            weigh_input=True,
            shared_ffn=experts.ffn,
        ),
    )


def _integers(c: Config, name: str, default: list[int]) -> list[int]:
    value = c.get(name)
    if not value:
        return default
    if not isinstance(value, list) or not all(type(v) is int for v in value):
        raise c.error(name, f"{brief(value)} is not an array of integers")
    return value


def smallthinker(c: Config) -> Read:
    c_ffn = c.integer("moe_ffn_hidden_size", 1, MAX_FFN)
    read = base(c, ffn=c_ffn)
    layers = read.spec.layers
    experts = c.integer("moe_num_primary_experts", 1, MAX_EXPERTS)
    softmax = c.flag("moe_primary_router_apply_softmax", False)
    c.flag("norm_topk_prob", True)
    c.refuse("moe_enable_secondary_experts", False)
    c.refuse("moe_enable_early_router", True)
    window = c.integer("sliding_window_size", 1, MAX_CONTEXT, 4096)
    roped = _integers(c, "rope_layout", [1] * layers)
    windowed = _integers(c, "sliding_window_layout", [0] * layers)
    if len(roped) != layers or len(windowed) != layers:
        raise c.error("rope_layout", f"is not a number for each of {layers} layers")
    return _with(
        read,
        nope=tuple(not flag for flag in roped),
        windows=tuple(window if flag else 0 for flag in windowed),
        moe=MoeSpec(
            layers=(True,) * layers,
            experts=experts,
            top=c.integer("moe_num_active_primary_experts", 1, experts),
            ffn=c_ffn,
            score="softmax" if softmax else "sigmoid",
            act="relu",
            early=True,
        ),
    )
