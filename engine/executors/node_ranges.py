"""Which part of every expert each NUMA node has: the range of the hidden columns that its threads compute."""

from ktransformers.engine.program import Experts, Program, WeightId
from ktransformers.engine.weights.formats import FORMATS

Cut = tuple[bool, list[int]]
"""Whether columns (or else rows) of every expert are cut, and where each node's part ends."""

_GROUP = 32
"""Columns that share a scale in a product's input: no part ends within a group."""


def cuts(program: Program, nodes: int) -> dict[WeightId, Cut]:
    """How the weights of routed experts are cut for `nodes` nodes: rows of gate and up, columns of down.

    Those of a layer with too few blocks for a part each are left whole; their threads are then those of all
    nodes, and their memory is wherever it comes from.
    """
    found: dict[WeightId, Cut] = {}
    for op in program.ops:
        if nodes < 2 or not isinstance(op, Experts) or op.experts == 1:
            continue
        down = program.weights[op.down]
        ends = range_ends(down.cols, max(FORMATS[down.format].block, _GROUP), nodes)
        if ends is not None:
            found |= {op.gate: (False, ends), op.up: (False, ends), op.down: (True, ends)}
    return found


def range_ends(hidden: int, block: int, nodes: int) -> list[int] | None:
    """Where `nodes` ranges of whole blocks end, as equal as that allows; None: there are too few blocks."""
    blocks = -(-hidden // block)
    if blocks < nodes:
        return None
    return [min(blocks * (n + 1) // nodes * block, hidden) for n in range(nodes)]
