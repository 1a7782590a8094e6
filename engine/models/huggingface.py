"""From a config.json to a ModelSpec. A new architecture is one function in FAMILIES and a table of names.

As with GGUF every field is used or refused.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from ktransformers.engine.models import huggingface_experts as experts
from ktransformers.engine.models.config_json import Config
from ktransformers.engine.models.fields import MAX_LAYERS, brief
from ktransformers.engine.models.huggingface_base import Read, act_of, base, qwen_windows, rope_of, windows_of
from ktransformers.engine.models.huggingface_delta import qwen3_next
from ktransformers.engine.models.spec import ModelError, ModelSpec, RopeSpec
from ktransformers.engine.weights import names


def _gemma_act(c: Config) -> Literal["gelu_tanh"]:
    """The first files said "gelu" in hidden_act and meant what hidden_activation says now."""
    c.refuse("hidden_act", "gelu", "gelu_pytorch_tanh")
    c.refuse("hidden_activation", "gelu_pytorch_tanh")
    return "gelu_tanh"


def _llama(c: Config) -> Read:
    read = base(c)
    return replace(read, spec=replace(read.spec, act=act_of(c)))


def _mistral(c: Config) -> Read:
    read = _llama(c)
    layers = read.spec.layers
    windows = windows_of(c, layers, lambda _: True, None) if c.has("sliding_window") else (0,) * layers
    return replace(read, spec=replace(read.spec, windows=windows))


def _qwen2(c: Config) -> Read:
    read = _llama(c)
    return replace(read, spec=replace(read.spec, qkv_bias=True, windows=qwen_windows(c, read)))


def _qwen3(c: Config) -> Read:
    read = base(c, head_dim=128)
    windows = qwen_windows(c, read)
    return replace(read, spec=replace(read.spec, act=act_of(c), qk_norm="head", windows=windows))


def _gemma_base(c: Config, rope_base: float = 10_000.0, rope_section: Config | None = None) -> Read:
    """Its norms multiply by 1 + weight (see models.folder)."""
    read = base(c, tied=True, head_dim=256, rope_base=rope_base, rope_section=rope_section)
    return replace(read, spec=replace(read.spec, act=_gemma_act(c), embed_scale=math.sqrt(read.spec.width)))


def _gemma_scores(c: Config, spec: ModelSpec, attention_softcap: float, logit_softcap: float) -> ModelSpec:
    return replace(
        spec,
        post_norms=True,
        attention_scale=c.number("query_pre_attn_scalar", 1e-3, 1e6, 256) ** -0.5,
        attention_softcap=c.number_unless_null("attn_logit_softcapping", 1e-3, 1e6, attention_softcap),
        logit_softcap=c.number_unless_null("final_logit_softcapping", 1e-3, 1e6, logit_softcap),
    )


def _gemma2(c: Config) -> Read:
    read = _gemma_base(c)
    c.get("cache_implementation")
    spec = _gemma_scores(c, read.spec, 50.0, 30.0)
    return replace(read, spec=replace(spec, windows=windows_of(c, spec.layers, lambda n: n % 2 == 0, 4096)))


def _gemma3(c: Config) -> Read:
    """Layers with a window have a rope of their own, in a section of its own in newer files."""
    sections = c.section("rope_parameters")
    full = sections.section("full_attention") if sections is not None else None
    read = _gemma_base(c, 1e6, full)
    local = RopeSpec(c.number("rope_local_base_freq", 1.001, 1e12, 10_000.0), read.spec.head_dim, False)
    if sections is not None and (own := sections.section("sliding_attention")) is not None:
        local, llama3 = rope_of(own, c, read.spec.head_dim, local.base)
        if llama3 is not None:
            raise sections.error("sliding_attention", "llama3 is not supported")
    pattern = c.integer("_sliding_window_pattern", 1, MAX_LAYERS, 6)
    pattern = c.integer("sliding_window_pattern", 1, MAX_LAYERS, pattern)
    spec = replace(
        _gemma_scores(c, read.spec, 0.0, 0.0),
        qk_norm="head",
        windows=windows_of(c, read.spec.layers, lambda n: (n + 1) % pattern != 0, 4096),
        local_rope=local,
    )
    return replace(read, spec=spec)


_PRE_NORMS: Final = {
    "input_layernorm": names.ATTN_NORM,
    "self_attn.q_proj": names.ATTN_Q,
    "self_attn.k_proj": names.ATTN_K,
    "self_attn.v_proj": names.ATTN_V,
    "self_attn.q_norm": names.ATTN_Q_NORM,
    "self_attn.k_norm": names.ATTN_K_NORM,
    "self_attn.o_proj": names.ATTN_OUT,
    "post_attention_layernorm": names.FFN_NORM,
    "mlp.gate_proj": names.FFN_GATE,
    "mlp.up_proj": names.FFN_UP,
    "mlp.down_proj": names.FFN_DOWN,
}
_EXPERTS: Final = {
    **_PRE_NORMS,
    "mlp.gate": names.FFN_GATE_INP,
    "mlp.gate.e_score_correction": names.EXP_PROBS_B,
    "mlp.experts.gate_proj": names.FFN_GATE_EXPS,
    "mlp.experts.up_proj": names.FFN_UP_EXPS,
    "mlp.experts.down_proj": names.FFN_DOWN_EXPS,
    **{
        f"mlp.{shared}.{theirs}": ours
        for shared in ("shared_expert", "shared_experts")
        for theirs, ours in (
            ("gate_proj", names.FFN_GATE_SHEXP),
            ("up_proj", names.FFN_UP_SHEXP),
            ("down_proj", names.FFN_DOWN_SHEXP),
        )
    },
    "mlp.shared_expert_gate": names.FFN_GATE_INP_SHEXP,
}
_MIXTRAL: Final = {
    **{name.replace("mlp.", "block_sparse_moe."): ours for name, ours in _EXPERTS.items()},
    "block_sparse_moe.primary_router": names.FFN_GATE_INP,
}
_LATENT: Final = {
    **_EXPERTS,
    "self_attn.q_a_proj": names.ATTN_Q_A,
    "self_attn.q_a_layernorm": names.ATTN_Q_A_NORM,
    "self_attn.q_b_proj": names.ATTN_Q_B,
    "self_attn.kv_a_proj_with_mqa": names.ATTN_KV_A,
    "self_attn.kv_a_layernorm": names.ATTN_KV_A_NORM,
    "self_attn.k_b": names.ATTN_K_B,
    "self_attn.v_b": names.ATTN_V_B,
}
_DELTA: Final = {
    **_EXPERTS,
    "linear_attn.in_proj_qkvz": names.SSM_IN,
    "linear_attn.in_proj_ba": names.SSM_BA,
    "linear_attn.conv1d": names.SSM_CONV,
    "linear_attn.dt": names.SSM_DT,
    "linear_attn.norm": names.SSM_NORM,
    "linear_attn.out_proj": names.SSM_OUT,
}
_GPT_OSS: Final = {
    **_EXPERTS,
    "mlp.router": names.FFN_GATE_INP,
    "self_attn.sinks": names.ATTN_SINKS,
}
_LLAMA4: Final = {
    **{name.replace("mlp.", "feed_forward."): ours for name, ours in _EXPERTS.items()},
    "feed_forward.router": names.FFN_GATE_INP,
}
_POST_NORMS: Final = {
    **_PRE_NORMS,
    "post_attention_layernorm": names.ATTN_POST_NORM,
    "pre_feedforward_layernorm": names.FFN_NORM,
    "post_feedforward_layernorm": names.FFN_POST_NORM,
}


@dataclass(frozen=True)
class Family:
    """What one model_type needs to be read."""

    read: Callable[[Config], Read]
    layer: Mapping[str, str] = field(default_factory=lambda: _PRE_NORMS)
    """Names of a layer's tensors, without "model.layers.N." and ".weight", to ours."""
    norm_offset: float = 0.0
    """What is added to norm weights, but to those of gated results (names.SSM_NORM)."""
    inputs_first: bool = False
    alternate: bool = False
    """How fused experts lie, see models.gather."""


FAMILIES: Final[dict[str, Family]] = {
    "llama": Family(_llama),
    "mistral": Family(_mistral),
    "qwen2": Family(_qwen2),
    "qwen3": Family(_qwen3),
    "mixtral": Family(experts.mixtral, _MIXTRAL),
    "qwen2_moe": Family(experts.qwen2_moe, _EXPERTS),
    "qwen3_moe": Family(experts.qwen3_moe, _EXPERTS),
    "qwen3_next": Family(qwen3_next, _DELTA, norm_offset=1.0),
    "olmoe": Family(experts.olmoe, _EXPERTS),
    "deepseek_v2": Family(experts.deepseek_v2, _LATENT),
    "deepseek_v3": Family(experts.deepseek_v3, _LATENT),
    "kimi_k2": Family(experts.deepseek_v3, _LATENT),
    "glm4_moe": Family(experts.glm4_moe, _EXPERTS),
    "gpt_oss": Family(experts.gpt_oss, _GPT_OSS, inputs_first=True, alternate=True),
    "llama4_text": Family(experts.llama4, _LLAMA4, inputs_first=True),
    "smallthinker": Family(experts.smallthinker, _MIXTRAL),
    "gemma": Family(_gemma_base, norm_offset=1.0),
    "gemma2": Family(_gemma2, _POST_NORMS, norm_offset=1.0),
    "gemma3_text": Family(_gemma3, _POST_NORMS, norm_offset=1.0),
}

TEXT_OF: Final = {"gemma3": "gemma3_text", "llama4": "llama4_text"}
"""Models that see, too: their text part is a model of its own in the field text_config."""


def read_config(values: Mapping[str, object]) -> tuple[Read, Family]:
    """The spec of the model that a config.json describes. ModelError names the field that is missing, wrong
    or not supported."""
    kind = values.get("model_type")
    inner = values.get("text_config")
    if isinstance(kind, str) and kind in TEXT_OF and isinstance(inner, dict):
        values = {"vocab_size": values.get("vocab_size"), "model_type": TEXT_OF[kind], **inner}
        kind = values["model_type"]
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        what = f"{brief(kind)} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        raise ModelError(f"config.json: field 'model_type': {what}")
    config = Config(values)
    read = family.read(config)
    config.get("quantization_config")  # weights.quantised reads it
    config.finish()
    return read, family
