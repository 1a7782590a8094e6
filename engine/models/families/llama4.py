"""Llama 4, the text model (https://ai.meta.com/blog/llama-4-multimodal-intelligence/)."""

from dataclasses import replace
from typing import Final

from ktransformers.engine.models.families.base import base, moe
from ktransformers.engine.models.fields import MAX_LAYERS
from ktransformers.engine.models.keys import Keys
from ktransformers.engine.models.spec import ModelSpec

CHUNK: Final = 8192
SPAN: Final = 8192
SCALE: Final = 0.1
NOPE_EVERY: Final = 4
"""Files do not say these."""
MAVERICK_EXPERTS: Final = 128


def llama4(keys: Keys) -> ModelSpec:
    """Three layers with rope and chunked attention, then one without both, whose queries grow with their
    position. Experts see their input weighted by a sigmoid. Maverick does not norm queries and keys."""
    spec = base("llama4", keys, interleaved=True, experts=True)
    step = keys.integer("interleave_moe_layer_step", 1, MAX_LAYERS, 1)
    experts = moe(keys, spec.layers)
    experts = replace(
        experts,
        layers=tuple((layer + 1) % step == 0 for layer in range(spec.layers)),
        score="sigmoid",
        normalise=False,
        weigh_input=True,
        shared_ffn=experts.ffn,
    )
    return replace(
        spec,
        nope=tuple((layer + 1) % NOPE_EVERY == 0 for layer in range(spec.layers)),
        chunk=CHUNK,
        temperature=(SPAN, SCALE),
        unit_qk=experts.experts != MAVERICK_EXPERTS,
        moe=experts,
    )
