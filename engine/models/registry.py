"""From the metadata of a GGUF file to a ModelSpec. A new architecture is one function in ARCHITECTURES.

Every `<architecture>.*` key is used or refused: a key that is not understood may change the mathematics.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

import numpy as np

from ktransformers.engine.models.spec import ModelError, ModelSpec, RopeSpec, Yarn
from ktransformers.engine.weights.gguf import Value

MAX_LAYERS: Final = 1024
MAX_WIDTH: Final = 2**17
MAX_HEADS: Final = 1024
MAX_HEAD_DIM: Final = 512
MAX_FFN: Final = 2**20
MAX_CONTEXT: Final = 2**24

_DESCRIPTIVE: Final = frozenset({"rope.scaling.finetuned", "tensor_data_layout", "vocab_size"})
"""Keys that describe and do not change what is computed (the vocabulary is counted, not believed)."""


def _brief(value: Value | None) -> str:
    """A value of a file as a few printable words."""
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)} values"
    return repr(value[:40] + "..." if isinstance(value, str) and len(value) > 40 else value)


class Keys:
    """The `<architecture>.*` keys of a file. Remembers which were asked for, to refuse the others."""

    def __init__(self, architecture: str, metadata: Mapping[str, Value]) -> None:
        prefix = architecture + "."
        self._values = {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}
        self._prefix = prefix
        self._asked: set[str] = set(_DESCRIPTIVE)

    def error(self, name: str, what: str) -> ModelError:
        return ModelError(f"key '{self._prefix}{name}': {what}")

    def get(self, name: str) -> Value | None:
        self._asked.add(name)
        return self._values.get(name)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]. A file may give one for each layer: they must be equal."""
        value = self.get(name)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.error(name, f"{_brief(value)} is not an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]."""
        value = self.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
            raise self.error(name, f"{_brief(value)} is not a number from {low} to {high}")
        return float(value)  # type: ignore[arg-type]

    def refuse(self, name: str, harmless: Value) -> None:
        """A key of a variation that is not implemented: it may be there if it says that it is not used."""
        value = self.get(name)
        if value is not None and not (type(value) is type(harmless) and value == harmless):
            raise self.error(name, f"{_brief(value)} is not supported")

    def finish(self) -> None:
        """Refuse keys that nobody has asked for."""
        for name in self._values:
            if name not in self._asked:
                raise self.error(ascii(name)[1:-1][:80], "is not supported")


def _rope(keys: Keys, head_dim: int, interleaved: bool) -> RopeSpec:
    dims = keys.integer("rope.dimension_count", 2, head_dim, head_dim)
    if dims % 2:
        raise keys.error("rope.dimension_count", f"{dims} is odd")
    rope = RopeSpec(keys.number("rope.freq_base", 1.001, 1e12, 10_000.0), dims, interleaved)
    kind = keys.get("rope.scaling.type")
    if kind is not None and not isinstance(kind, str):
        raise keys.error("rope.scaling.type", f"{_brief(kind)} is not a name")
    factor = keys.number("rope.scaling.factor", 1e-6, 1e6, 1.0)
    if kind is None or kind == "none" or kind == "linear":
        keys.refuse("rope.scaling.attn_factor", 1.0)
        keys.get("rope.scaling.original_context_length")
        if kind != "linear" and factor != 1.0:
            raise keys.error("rope.scaling.factor", f"{factor} without a scaling type")
        return replace(rope, factor=factor)
    if kind != "yarn":
        raise keys.error("rope.scaling.type", f"{_brief(kind)} is not supported (none, linear and yarn are)")
    keys.refuse("rope.scaling.yarn_ext_factor", 1.0)
    keys.refuse("rope.scaling.yarn_log_multiplier", 0.0)
    attention = keys.number("rope.scaling.attn_factor", 1e-3, 1e3, 1.0)
    return replace(
        rope,
        yarn=Yarn(
            factor=factor,
            original_context=keys.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT),
            attention_factor=keys.number("rope.scaling.yarn_attn_factor", 1e-3, 1e3, attention),
            beta_fast=keys.number("rope.scaling.yarn_beta_fast", 1e-3, 1e4, 32.0),
            beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1e-3, 1e4, 1.0),
        ),
    )


def _base(architecture: str, keys: Keys, interleaved: bool) -> ModelSpec:
    """What all architectures have in common."""
    layers = keys.integer("block_count", 1, MAX_LAYERS)
    width = keys.integer("embedding_length", 1, MAX_WIDTH)
    heads = keys.integer("attention.head_count", 1, MAX_HEADS)
    kv_heads = keys.integer("attention.head_count_kv", 1, heads, heads)
    if heads % kv_heads:
        raise keys.error("attention.head_count_kv", f"{kv_heads} does not divide {heads} heads")
    if width % heads and keys.get("attention.key_length") is None:
        raise keys.error("attention.head_count", f"{heads} does not divide the width {width}")
    head_dim = keys.integer("attention.key_length", 2, MAX_HEAD_DIM, width // heads)
    if keys.integer("attention.value_length", 2, MAX_HEAD_DIM, head_dim) != head_dim:
        raise keys.error("attention.value_length", f"differs from the key length {head_dim}: not supported")
    if not 2 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        raise keys.error("attention.head_count", f"heads of {head_dim} elements are not supported")
    keys.refuse("attention.causal", True)
    keys.refuse("expert_count", 0)
    keys.refuse("expert_used_count", 0)
    return ModelSpec(
        architecture=architecture,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=keys.integer("feed_forward_length", 1, MAX_FFN),
        context=keys.integer("context_length", 1, MAX_CONTEXT),
        eps=keys.number("attention.layer_norm_rms_epsilon", 1e-12, 0.1),
        rope=_rope(keys, head_dim, interleaved),
        attention_scale=keys.number("attention.scale", 1e-4, 10.0, head_dim**-0.5),
        windows=(0,) * layers,
    )


def _llama(keys: Keys) -> ModelSpec:
    """Llama and mistral. Converters permute the rows of q and k so that rope pairs are neighbours."""
    spec = _base("llama", keys, interleaved=True)
    window = keys.integer("attention.sliding_window", 0, MAX_CONTEXT, 0)
    return replace(spec, windows=(window,) * spec.layers)


def _qwen2(keys: Keys) -> ModelSpec:
    return replace(_base("qwen2", keys, interleaved=False), qkv_bias=True)


def _qwen3(keys: Keys) -> ModelSpec:
    return replace(_base("qwen3", keys, interleaved=False), qk_norm=True)


def _windows(keys: Keys, layers: int, pattern: int) -> tuple[int, ...]:
    """Every `pattern`-th layer sees all positions. A file may give another pattern, or a bool per layer."""
    window = keys.integer("attention.sliding_window", 1, MAX_CONTEXT)
    value = keys.get("attention.sliding_window_pattern")
    if isinstance(value, np.ndarray) and value.dtype == np.bool_:
        if len(value) != layers:
            raise keys.error("attention.sliding_window_pattern", f"{len(value)} flags for {layers} layers")
        return tuple(window if flag else 0 for flag in value.tolist())
    pattern = keys.integer("attention.sliding_window_pattern", 1, MAX_LAYERS, pattern)
    return tuple(window if layer % pattern < pattern - 1 else 0 for layer in range(layers))


def _gemma_base(architecture: str, keys: Keys) -> ModelSpec:
    """Converters add 1 to gemma's norm weights, so that its norms are ordinary ones."""
    spec = _base(architecture, keys, interleaved=False)
    return replace(spec, act="gelu_tanh", embed_scale=math.sqrt(spec.width))


def _gemma2(keys: Keys) -> ModelSpec:
    spec = _gemma_base("gemma2", keys)
    return replace(
        spec,
        post_norms=True,
        windows=_windows(keys, spec.layers, 2),
        attention_softcap=keys.number("attn_logit_softcapping", 0.0, 1e6, 50.0),
        logit_softcap=keys.number("final_logit_softcapping", 0.0, 1e6, 30.0),
        attention_scale=_gemma_scale(keys, spec, layers_of_27b=46),
    )


def _gemma3(keys: Keys) -> ModelSpec:
    spec = _gemma_base("gemma3", keys)
    local_base = keys.number("rope.freq_base_swa", 1.001, 1e12, 10_000.0)
    return replace(
        spec,
        qk_norm=True,
        post_norms=True,
        windows=_windows(keys, spec.layers, 6),
        local_rope=RopeSpec(local_base, spec.rope.dims, spec.rope.interleaved),
        attention_softcap=keys.number("attn_logit_softcapping", 0.0, 1e6, 0.0),
        logit_softcap=keys.number("final_logit_softcapping", 0.0, 1e6, 0.0),
        attention_scale=_gemma_scale(keys, spec, layers_of_27b=62),
    )


def _gemma_scale(keys: Keys, spec: ModelSpec, layers_of_27b: int) -> float:
    """The 27B models divide the width by the heads, not the head size; their files do not say so."""
    if keys.get("attention.scale") is not None or spec.layers != layers_of_27b:
        return spec.attention_scale
    return float((spec.width / spec.heads) ** -0.5)


ARCHITECTURES: Final[dict[str, Callable[[Keys], ModelSpec]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": lambda keys: _gemma_base("gemma", keys),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
}


def read_spec(metadata: Mapping[str, Value]) -> ModelSpec:
    """The spec of the model in a file. ModelError names the key that is missing, wrong or not supported."""
    kind = metadata.get("general.type", "model")
    if not isinstance(kind, str) or kind != "model":
        raise ModelError(f"key 'general.type': {_brief(kind)} is not a model")
    name = metadata.get("general.architecture")
    build = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if build is None or not isinstance(name, str):
        supported = ", ".join(sorted(ARCHITECTURES))
        what = f"{_brief(name)} is not supported; supported are {supported}"
        raise ModelError(f"key 'general.architecture': {what}")
    keys = Keys(name, metadata)
    spec = build(keys)
    keys.finish()
    return spec
