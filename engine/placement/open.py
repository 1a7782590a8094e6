"""From the settings to a placement: the file of rules, and what is known of experts."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from ktransformers.engine.config import EngineConfig
from ktransformers.engine.placement.place import Placement, experts_name, experts_ops, place
from ktransformers.engine.placement.rules import PlacementError, Rules, read_rules
from ktransformers.engine.placement.statistics import HALF_LIFE, ExpertStatistics, Records
from ktransformers.engine.program import Program


@dataclass(frozen=True)
class Hybrid:
    """Experts on two sides."""

    placement: Placement
    records: Records


def placement_rules(config: EngineConfig) -> Rules | None:
    """What the setting `placement` says; None when there is none. PlacementError."""
    if not config.placement:
        return None
    if config.torch_device is None:
        raise PlacementError(
            "placement: the native executor has all of the model on the CPU: set executor to the device of "
            "attention, such as 'torch:cuda', or leave placement out"
        )
    if config.expert_bytes is not None:
        raise PlacementError("placement: not together with expert_bytes: experts on the cpu are in memory")
    from ktransformers.engine import _kernels

    return read_rules(config.placement, tuple(_kernels.isas()))


def open_placement(config: EngineConfig, program: Program, model: str, rules: Rules) -> Hybrid:
    """What is known of experts, and the placement with room for all of them; `model`: see Records."""
    names = {experts_name(program, op): op.experts for _, op in experts_ops(program)}
    half_life = HALF_LIFE if rules.policy == "adaptive" else math.inf
    statistics = ExpertStatistics(names, half_life)
    file = rules.statistics
    if file is None and config.cache.cache_dir:
        folder = Path(config.cache.cache_dir)
        file = folder.with_name(f"{folder.name}-experts") / f"{model}.json"
    if file is not None:
        statistics.load(file, model)
    return Hybrid(place(program, rules, sys.maxsize, statistics), Records(statistics, file, model))
