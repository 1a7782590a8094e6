"""A weight as it is stored, before the model says what it is for."""

from dataclasses import dataclass

from ktransformers.engine.program import U8, Pieces


@dataclass(frozen=True)
class Stored:
    """What a folder holds under one name; quantised checkpoints spread it over several tensors."""

    format: int
    shape: tuple[int, ...]
    nbytes: int
    data: U8 | Pieces
