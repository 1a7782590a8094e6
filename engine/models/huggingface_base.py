"""What all architectures read alike from a config.json.

Fields have the defaults of transformers' configuration classes, which leaves them out of the file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

from ktransformers.engine.models.config_json import Config
from ktransformers.engine.models.fields import (
    MAX_CONTEXT,
    MAX_FFN,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    brief,
)
from ktransformers.engine.models.spec import ModelSpec, RopeSpec, Yarn, sharpening

MAX_VOCAB: Final = 2**21

_ACTS: Final[dict[str, Literal["silu", "gelu_tanh"]]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True)
class Llama3Rope:
    """Slow frequencies are slowed down more (https://github.com/meta-llama/llama-models, llama 3.1)."""

    factor: float
    low: float
    high: float
    original: int

    def divisor(self, turns: float) -> float:
        """By what a frequency of so many turns in the original context is divided."""
        smooth = min(max((turns - self.low) / (self.high - self.low), 0.0), 1.0)
        return 1.0 / ((1.0 - smooth) / self.factor + smooth)

    def divisors(self, rope: RopeSpec) -> list[float]:
        """Of all frequencies [dims / 2]."""
        n = rope.dims // 2
        return [self.divisor(self.original * rope.base ** (-i / n) / (2 * math.pi)) for i in range(n)]


def rope_section_of(c: Config) -> Config:
    """rope_parameters, or in older files rope_scaling with the other fields beside it."""
    section = c.section("rope_parameters")
    if section is None:
        return c.section("rope_scaling") or Config({}, "config.json: rope_scaling")
    c.get("rope_scaling")  # for older versions of transformers: it says the same
    return section


def rope_of(
    section: Config, c: Config, head_dim: int, base: float, partial: float = 1.0
) -> tuple[RopeSpec, Llama3Rope | None]:
    """Fields of the section come before those of the file."""
    partial = c.number("partial_rotary_factor", 0.0, 1.0, partial)
    part = section.number("partial_rotary_factor", 0.0, 1.0, partial)
    dims = int(head_dim * part)
    if dims < 2 or dims % 2:
        raise section.error("partial_rotary_factor", f"{dims} of {head_dim} elements cannot be rotated")
    base = section.number("rope_theta", 1.001, 1e12, c.number("rope_theta", 1.001, 1e12, base))
    rope = RopeSpec(base, dims, interleaved=False)
    kind = section.text("rope_type", section.text("type", "default"))
    section.refuse("type", kind)
    if kind == "default":
        return rope, None
    factor = section.number("factor", 1e-3, 1e6)
    if kind == "linear":
        return replace(rope, factor=factor), None
    original = section.integer(
        "original_max_position_embeddings",
        1,
        MAX_CONTEXT,
        c.integer("max_position_embeddings", 1, MAX_CONTEXT),
    )
    if kind == "llama3":
        low = section.number("low_freq_factor", 1e-3, 1e3)
        high = section.number("high_freq_factor", 1e-3, 1e3)
        if high <= low:
            raise section.error("high_freq_factor", f"{high} is not above low_freq_factor")
        return rope, Llama3Rope(factor, low, high, original)
    if kind == "yarn":
        return replace(rope, yarn=_yarn(section, factor, original)), None
    what = f"{brief(kind)} is not supported (default, linear, llama3 and yarn are)"
    raise section.error("rope_type", what)


def _yarn(section: Config, factor: float, original: int) -> Yarn:
    mscale = section.number("mscale", 0.0, 1e3, 0.0)
    mscale_all = section.number("mscale_all_dim", 0.0, 1e3, 0.0)
    default = sharpening(factor)
    if mscale and mscale_all:
        default = sharpening(factor, mscale) / sharpening(factor, mscale_all)
    section.refuse("finetuned", True, False)
    return Yarn(
        factor=factor,
        original_context=original,
        attention_factor=section.number("attention_factor", 1e-3, 1e3, default),
        beta_fast=section.number("beta_fast", 1e-3, 1e4, 32.0),
        truncate=section.flag("truncate", True),
        beta_slow=section.number("beta_slow", 1e-3, 1e4, 1.0),
    )


@dataclass(frozen=True)
class Read:
    """What a config.json says."""

    spec: ModelSpec
    vocab: int
    tied: bool
    """The output is the embedding."""
    llama3: Llama3Rope | None = None


def base(
    c: Config,
    *,
    tied: bool = False,
    head_dim: int | None = None,
    rope_base: float = 10_000.0,
    rope_section: Config | None = None,
    partial: float = 1.0,
    ffn: int | None = None,
) -> Read:
    """What all architectures have in common. The arguments are what a file leaves out because it is the
    architecture's default; `rope_section` is for one that has several."""
    layers = c.integer("num_hidden_layers", 1, MAX_LAYERS)
    width = c.integer("hidden_size", 1, MAX_WIDTH)
    heads = c.integer("num_attention_heads", 1, MAX_HEADS)
    kv_heads = c.integer("num_key_value_heads", 1, heads, heads)
    if heads % kv_heads:
        raise c.error("num_key_value_heads", f"{kv_heads} does not divide {heads} heads")
    if head_dim is None and width % heads and not c.has("head_dim"):
        raise c.error("num_attention_heads", f"{heads} does not divide the width {width}")
    head_dim = c.integer("head_dim", 2, MAX_HEAD_DIM, head_dim or width // heads)
    if not 2 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        raise c.error("head_dim", f"heads of {head_dim} elements are not supported")
    rope, llama3 = rope_of(rope_section or rope_section_of(c), c, head_dim, rope_base, partial)
    context = c.integer("max_position_embeddings", 1, MAX_CONTEXT)
    if rope.yarn is not None:
        context = min(max(context, int(rope.yarn.factor * rope.yarn.original_context)), MAX_CONTEXT)
    c.refuse("use_bidirectional_attention", False)
    c.get("attention_bias")  # which biases there are is seen from the tensors
    c.get("mlp_bias")
    vocab = c.integer("vocab_size", 1, MAX_VOCAB)
    spec = ModelSpec(
        architecture=c.text("model_type"),
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=c.integer("intermediate_size", 1, MAX_FFN, ffn),
        context=context,
        eps=c.number("rms_norm_eps", 1e-12, 0.1, 1e-6),
        rope=rope,
        attention_scale=head_dim**-0.5,
        windows=(0,) * layers,
    )
    return Read(spec, vocab, c.flag("tie_word_embeddings", tied), llama3)


def act_of(c: Config) -> Literal["silu", "gelu_tanh"]:
    name = c.text("hidden_act", "silu")
    if name not in _ACTS:
        raise c.error("hidden_act", f"{brief(name)} is not supported ({', '.join(_ACTS)} are)")
    return _ACTS[name]


def windows_of(
    c: Config, layers: int, pattern: Callable[[int], bool], default: int | None
) -> tuple[int, ...]:
    """The window of each layer; `pattern` says which have one when layer_types does not."""
    window = c.integer("sliding_window", 1, MAX_CONTEXT, default)
    kinds = c.texts("layer_types")
    if kinds is None:
        return tuple(window if pattern(layer) else 0 for layer in range(layers))
    if len(kinds) != layers:
        raise c.error("layer_types", f"{len(kinds)} kinds for {layers} layers")
    known = {"sliding_attention": window, "full_attention": 0}
    if unknown := set(kinds) - known.keys():
        raise c.error("layer_types", f"{brief(min(unknown))} is not supported")
    return tuple(known[kind] for kind in kinds)


def qwen_windows(c: Config, read: Read) -> tuple[int, ...]:
    """Qwen names a window that it does not use unless use_sliding_window says so."""
    first = c.integer("max_window_layers", 0, MAX_CONTEXT, 28)
    if c.flag("use_sliding_window", False):
        return windows_of(c, read.spec.layers, lambda layer: layer >= first, 4096)
    c.get("sliding_window")
    if "sliding_attention" in (c.texts("layer_types") or ()):
        raise c.error("layer_types", "a layer with a window, which use_sliding_window denies")
    return (0,) * read.spec.layers
