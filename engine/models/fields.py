"""Fields of a model's description, typed and bounded as they are read, and refused when nobody asks for them.

The rule of both kinds of files that describe a model (`keys.py`, `config_json.py`): a field of which nobody
knows what it changes may change the mathematics.
"""

from collections.abc import Iterable, Mapping
from typing import Final, Generic, TypeVar

import numpy as np

from ktransformers.engine.models.spec import ModelError

MAX_LAYERS: Final = 1024
MAX_WIDTH: Final = 2**17
MAX_HEADS: Final = 1024
MAX_HEAD_DIM: Final = 512
MAX_FFN: Final = 2**20
MAX_CONTEXT: Final = 2**24
MAX_EXPERTS: Final = 1024
MAX_TAPS: Final = 16
"""Of a short convolution."""

V = TypeVar("V")


def brief(value: object) -> str:
    """A value of a file as a few printable words."""
    if isinstance(value, list | np.ndarray):
        return f"an array of {len(value)} values"
    if isinstance(value, dict):
        return f"an object of {len(value)} values"
    return ascii(value[:40] + "..." if isinstance(value, str) and len(value) > 40 else value)[:60]


class Fields(Generic[V]):
    """Fields by name. `where` is what an error calls a field, up to its name. Remembers which were asked for.

    `descriptive` names fields that change nothing, which nobody needs to ask for.
    """

    UNASKED = "is not supported"
    """What is said of a field that nobody asked for."""

    def __init__(self, values: Mapping[str, V], where: str, descriptive: Iterable[str]) -> None:
        self._values = values
        self._where = where
        self._asked = set(descriptive)

    def error(self, name: str, what: str) -> ModelError:
        return ModelError(f"{self._where}{name}': {what}")

    def get(self, name: str) -> V | None:
        """Any value, None when it is absent."""
        self._asked.add(name)
        return self._values.get(name)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in [low, high]."""
        value = self._one(name)
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
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(name, f"{brief(value)} is not a number from {low} to {high}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"{brief(value)} is neither true nor false")
        return value

    def refuse(self, name: str, *harmless: object) -> None:
        """A field of a variation that is not implemented: it may be there if it says that it is not used."""
        value = self.get(name)
        if value is not None and not any(type(value) is type(h) and value == h for h in harmless):
            raise self.error(name, f"{brief(value)} is not supported")

    def finish(self) -> None:
        """Refuse fields that nobody has asked for."""
        for name in self._values:
            if name not in self._asked:
                raise self.error(ascii(name)[1:-1][:80], self.UNASKED)

    def _one(self, name: str) -> object:
        """The value of what may be written in more than one way."""
        return self.get(name)
