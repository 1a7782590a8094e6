"""What the rest of the engine asks of a model on disk, whatever its container."""

from collections.abc import Mapping
from typing import Protocol

from ktransformers.engine.program import U8, Pieces


class StoredTensor(Protocol):
    """A tensor before its bytes are asked for."""

    @property
    def format(self) -> int:
        """See weights.formats."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In numpy's order: rows first. Of experts: [experts, rows, cols]."""

    @property
    def nbytes(self) -> int: ...


class Checkpoint(Protocol):
    """Named tensors, under the names of weights.names. A GgufFile is one; so is models.huggingface's."""

    @property
    def tensors(self) -> Mapping[str, StoredTensor]: ...

    @property
    def tokens(self) -> int:
        """Tokens of its vocabulary: rows that the embedding must have. 0: it has none."""

    def tensor_bytes(self, name: str) -> U8 | Pieces:
        """The raw bytes of a tensor: views of the file, or pieces that are made when they are read. KeyError
        for an unknown name."""
