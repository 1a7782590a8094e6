"""Experts in fewer bits than their file has: made when they are loaded, with the error measured.

Groups of 32 elements of a row share a scale: GGUF's Q8_0 for int8 and Q4_0 for int4, whose scale makes the
largest element of a group exact.
"""

import threading
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Final, Literal

from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.program import U8, Pieces, Program, Tensor, expert_weights
from ktransformers.engine.weights import pages
from ktransformers.engine.weights.formats import FORMATS

if TYPE_CHECKING:
    from ktransformers.engine import _kernels

ExpertFormat = Literal["as-is", "int8", "int4"]

_GROUP: Final = 32
_Q4_0: Final = 2
_Q8_0: Final = 8


@dataclass
class Errors:
    """What was lost, of the tensors that were read so far. Experts may be made in several threads."""

    format: str
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """For each tensor the sum of the squared errors and of the squared weights."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, error: float, size: float) -> None:
        with self._lock:
            old = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = (old[0] + error, old[1] + size)

    def __str__(self) -> str:
        """One line: the root of the mean squared error, as a share of the weights'."""
        shares = {name: (e / s) ** 0.5 if s else 0.0 for name, (e, s) in self.sums.items()}
        if not shares:
            return f"no experts were made {self.format}: none of them has more bits"
        error, size = (sum(pair[i] for pair in self.sums.values()) for i in (0, 1))
        worst = max(shares, key=lambda name: shares[name])
        mean = (error / size) ** 0.5 if size else 0.0
        where = f"worst in {worst}: {shares[worst]:.2%}"
        return f"{len(shares)} tensors of experts are {self.format} now: an error of {mean:.2%} ({where})"


def requantise(program: Program, wanted: ExpertFormat, threads: int = 1) -> tuple[Program, Errors | None]:
    """The program with its routed experts in a format of fewer bits, and where their errors will be found
    once they are loaded, each by `threads` threads. Those that have no more bits already stay as they are.
    ModelError for a model without any."""
    if wanted == "as-is":
        return program, None
    chosen = expert_weights(program)
    if not chosen:
        raise ModelError("expert_format: this model has no routed experts")
    maker = Requantiser(wanted, threads)
    weights = list(program.weights)
    for i in chosen:
        weights[i] = maker.made(weights[i])
    return replace(program, weights=tuple(weights)), maker.errors


def requantised_bytes(tensor: Tensor, wanted: ExpertFormat) -> int:
    """Bytes of a tensor that a Requantiser has made."""
    number = _number(tensor, wanted)
    return tensor.data.nbytes if number is None else _nbytes(tensor, number)


def _number(tensor: Tensor, wanted: ExpertFormat) -> int | None:
    """The format that is made; None: the tensor stays as it is, having no more bits."""
    if wanted == "as-is":
        return None
    number = _Q4_0 if wanted == "int4" else _Q8_0
    fewer = _bits(tensor.format) > _bits(number) and tensor.cols % _GROUP == 0
    return number if fewer else None


def _nbytes(tensor: Tensor, number: int) -> int:
    return tensor.rows * tensor.cols // FORMATS[number].block * FORMATS[number].nbytes


def _bits(number: int) -> float:
    fmt = FORMATS[number]
    return 8 * fmt.nbytes / fmt.block


class Requantiser:
    """Makes experts in fewer bits, each by `threads` threads; `errors` has what was lost so far."""

    def __init__(self, wanted: ExpertFormat, threads: int) -> None:
        self.errors = Errors(wanted)
        self._wanted, self._threads = wanted, threads

    def made(self, tensor: Tensor) -> Tensor:
        """The tensor in fewer bits, made when it is read; itself, if it has no more already."""
        number = _number(tensor, self._wanted)
        if number is None:
            return tensor
        reads = tuple(partial(self._make, tensor, number, expert) for expert in range(tensor.experts))
        return replace(tensor, format=number, data=Pieces(_nbytes(tensor, number), reads))

    @cached_property
    def _pool(self) -> "_kernels.ThreadPool":
        from ktransformers.engine import _kernels

        return _kernels.ThreadPool(self._threads)

    def _make(self, tensor: Tensor, number: int, expert: int) -> U8:
        """The blocks of one expert; the pages that it had in its file are given back."""
        from ktransformers.engine import _kernels

        rows = tensor.rows // tensor.experts
        with pages.reading(tensor.expert(expert)) as raw:
            try:
                blocks, error, size = _kernels.requantise(
                    self._pool, _kernels.isas()[0], tensor.format, number, rows, tensor.cols, raw
                )
            except ValueError as e:
                raise ValueError(f"expert {expert}: {e}") from None
        self.errors.add(tensor.name, error, size)
        return blocks
