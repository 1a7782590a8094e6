"""The keys of a model's description, each checked as it is read, and refused when nobody asks for it."""

from collections.abc import Mapping
from typing import Final

import numpy as np

from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.weights.gguf import Value

MAX_LAYERS: Final = 1024
MAX_WIDTH: Final = 2**17
MAX_HEADS: Final = 1024
MAX_HEAD_DIM: Final = 512
MAX_FFN: Final = 2**20
MAX_CONTEXT: Final = 2**24
MAX_EXPERTS: Final = 1024

DESCRIPTIVE: Final = frozenset({"rope.scaling.finetuned", "tensor_data_layout", "vocab_size"})
"""Keys that describe and do not change what is computed (the vocabulary is counted, not believed)."""


def brief(value: Value | None) -> str:
    """A value of a file as a few printable words."""
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)} values"
    return repr(value[:40] + "..." if isinstance(value, str) and len(value) > 40 else value)


class Keys:
    """The `<architecture>.*` keys of a file. Remembers which were asked for, to refuse the others."""

    def __init__(self, architecture: str, metadata: Mapping[str, Value]) -> None:
        prefix = architecture + "."
        self._values = {k[len(prefix) :]: v for k, v in metadata.items() if k.startswith(prefix)}
        self._prefix = prefix
        self._asked: set[str] = set(DESCRIPTIVE)

    def error(self, name: str, what: str) -> ModelError:
        return ModelError(f"key '{self._prefix}{name}': {what}")

    def get(self, name: str) -> Value | None:
        self._asked.add(name)
        return self._values.get(name)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]. A file may give one for each layer: they must be equal."""
        value = self.get(name)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.error(name, f"{brief(value)} is not an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]."""
        value = self.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
            raise self.error(name, f"{brief(value)} is not a number from {low} to {high}")
        return float(value)  # type: ignore[arg-type]

    def flag(self, name: str, default: bool) -> bool:
        """A bool."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"{brief(value)} is not a bool")
        return value

    def refuse(self, name: str, harmless: Value) -> None:
        """A key of a variation that is not implemented: it may be there if it says that it is not used."""
        value = self.get(name)
        if value is not None and not (type(value) is type(harmless) and value == harmless):
            raise self.error(name, f"{brief(value)} is not supported")

    def finish(self) -> None:
        """Refuse keys that nobody has asked for."""
        for name in self._values:
            if name not in self._asked:
                raise self.error(ascii(name)[1:-1][:80], "is not supported")
