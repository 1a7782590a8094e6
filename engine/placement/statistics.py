"""How often each expert is chosen: recorded while serving, kept beside the cache, read at the next start."""

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

log = logging.getLogger(__name__)

_LARGEST_FILE: Final = 64 << 20
_VERSION: Final = 1
HALF_LIFE: Final = 65536.0
"""Choices of an op's router after which an older choice counts half, where only recent ones matter."""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    model: str
    counts: dict[str, list[float]]


class ExpertStatistics:
    """Counts for each expert of each op, by the op's name (blk.N.experts)."""

    def __init__(self, experts: dict[str, int], half_life: float = math.inf) -> None:
        """`experts`: how many each op has. `half_life`: see HALF_LIFE; by itself all choices count alike."""
        self._counts: dict[str, F64] = {name: np.zeros(n) for name, n in experts.items()}
        self._half_life = half_life

    def of(self, name: str) -> F64:
        """[experts] of one op."""
        return self._counts[name]

    def add(self, name: str, counts: npt.NDArray[np.int64]) -> None:
        """Choices [experts] since the last call."""
        fading = 0.5 ** (float(counts.sum()) / self._half_life)
        self._counts[name] = self._counts[name] * fading + counts

    @property
    def total(self) -> float:
        """Of all ops."""
        return float(sum(counts.sum() for counts in self._counts.values()))

    def load(self, path: Path, model: str) -> None:
        """Take the counts of a file, if it is there and is of this model (as hexadecimal identity).

        A file that cannot be used costs what was learnt, and nothing else: it is logged.
        """
        try:
            if path.stat().st_size > _LARGEST_FILE:
                raise ValueError("too large")
            found = msgspec.json.decode(path.read_bytes(), type=_File)
            if found.version != _VERSION or found.model != model:
                raise ValueError("of another version or model")
            if {n: len(c) for n, c in found.counts.items()} != {n: len(c) for n, c in self._counts.items()}:
                raise ValueError("of other experts")
            counts = {name: np.array(c, np.float64) for name, c in found.counts.items()}
            if not all((np.isfinite(c) & (c >= 0)).all() for c in counts.values()):
                raise ValueError("a count is negative or not finite")
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            log.warning("statistics of experts: %s: %s; they begin anew", path, error)
            return
        self._counts = counts

    def save(self, path: Path, model: str) -> None:
        """Replace the file in one piece. Errors: OSError."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        counts = {name: c.tolist() for name, c in self._counts.items()}
        new.write_bytes(msgspec.json.encode(_File(_VERSION, model, counts)))
        os.replace(new, path)


@dataclass(frozen=True)
class Records:
    """Where counts of chosen experts are kept."""

    statistics: ExpertStatistics
    path: Path | None
    """None: they are forgotten."""
    model: str
    """Its identity, in hexadecimal."""

    def save(self) -> None:
        """What cannot be kept costs what was learnt."""
        if self.path is None:
            return
        try:
            self.statistics.save(self.path, self.model)
        except OSError as error:
            log.warning("statistics of experts are not kept: %s: %s", self.path, error)
