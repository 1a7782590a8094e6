"""Llama 1 to 3, Mistral, and Mixtral (https://arxiv.org/abs/2401.04088)."""

from dataclasses import replace

from ktransformers.engine.models.families.base import base, moe
from ktransformers.engine.models.fields import MAX_CONTEXT
from ktransformers.engine.models.keys import Keys
from ktransformers.engine.models.spec import ModelSpec


def llama(keys: Keys) -> ModelSpec:
    """Converters permute the rows of q and k so that rope pairs are neighbours. With experts it is Mixtral,
    whose feed_forward_length is an expert's."""
    spec = base("llama", keys, interleaved=True, experts=True)
    window = keys.integer("attention.sliding_window", 0, MAX_CONTEXT, 0)
    spec = replace(spec, windows=(window,) * spec.layers)
    experts = keys.get("expert_count")
    if experts is not None and not (type(experts) is int and experts == 0):
        return replace(spec, moe=moe(keys, spec.layers, spec.ffn))
    keys.refuse("expert_used_count", 0)
    return spec
