"""SmallThinker (https://arxiv.org/abs/2507.20984)."""

from dataclasses import replace
from typing import Final

from ktransformers.engine.models.families.base import base, moe
from ktransformers.engine.models.fields import MAX_CONTEXT
from ktransformers.engine.models.keys import Keys
from ktransformers.engine.models.spec import ModelSpec

PERIOD: Final = 4
"""Layers from one that sees all positions, without rope, to the next, in models that have windows."""


def smallthinker(keys: Keys) -> ModelSpec:
    """The router reads what enters the layer, so that experts can be fetched while attention computes."""
    spec = base("smallthinker", keys, interleaved=False, experts=True)
    window = keys.integer("attention.sliding_window", 0, MAX_CONTEXT, 0)
    whole = tuple(layer % PERIOD == 0 for layer in range(spec.layers))
    return replace(
        spec,
        windows=tuple(0 if sees_all else window for sees_all in whole),
        nope=whole if window else (),
        moe=replace(moe(keys, spec.layers, spec.ffn), act="relu", early=True),
    )
