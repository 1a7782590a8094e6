"""The keys of a GGUF file that describe its model."""

from collections.abc import Mapping
from typing import Final

import numpy as np

from ktransformers.engine.models.fields import Fields
from ktransformers.engine.weights.gguf import Value

_DESCRIPTIVE: Final = frozenset({"rope.scaling.finetuned", "tensor_data_layout", "vocab_size"})
"""Keys that describe and do not change what is computed (the vocabulary is counted, not believed)."""


class Keys(Fields[Value]):
    """The `<architecture>.*` keys of a file, by the rest of their names."""

    def __init__(self, architecture: str, metadata: Mapping[str, Value]) -> None:
        prefix = architecture + "."
        values = {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}
        super().__init__(values, f"key '{prefix}", _DESCRIPTIVE)

    def _one(self, name: str) -> object:
        """A file may give a number for each layer: equal ones are one."""
        value = self.get(name)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            return value[0].item()
        return value
