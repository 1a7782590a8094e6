"""OLMoE (https://arxiv.org/abs/2409.02060)."""

from dataclasses import replace

from ktransformers.engine.models.families.base import base, moe
from ktransformers.engine.models.keys import Keys
from ktransformers.engine.models.spec import ModelSpec


def olmoe(keys: Keys) -> ModelSpec:
    """Queries and keys are normed over all heads of a row; weights of the chosen are not normalised."""
    spec = base("olmoe", keys, interleaved=False, experts=True)
    experts = moe(keys, spec.layers, spec.ffn)
    normalise = keys.flag("expert_weights_norm", default=False)
    return replace(spec, qk_norm="row", moe=replace(experts, normalise=normalise))
