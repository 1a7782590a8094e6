"""Experts in fewer bits than their file has: made when they are loaded, with the error measured.

Groups of 32 elements of a row share a scale: GGUF's Q8_0 for int8 and Q4_0 for int4, whose scale makes the
largest element of a group exact.
"""

import threading
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.program import U8, Pieces, Program, Tensor, expert_weights
from ktransformers.engine.weights.dequantise import dequantise
from ktransformers.engine.weights.formats import FORMATS, GGUF_FORMATS, as_floats

F32 = npt.NDArray[np.float32]
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

    def add(self, name: str, before: F32, after: F32) -> None:
        error = float(np.square(before - after, dtype=np.float64).sum())
        size = float(np.square(before, dtype=np.float64).sum())
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


def requantise(program: Program, wanted: ExpertFormat) -> tuple[Program, Errors | None]:
    """The program with its routed experts in a format of fewer bits, and where their errors will be found
    once they are loaded. Those that have no more bits already stay as they are. ModelError for a model
    without any."""
    if wanted == "as-is":
        return program, None
    chosen = expert_weights(program)
    if not chosen:
        raise ModelError("expert_format: this model has no routed experts")
    number = _Q4_0 if wanted == "int4" else _Q8_0
    errors = Errors(wanted)
    weights = list(program.weights)
    for i in chosen:
        if _bits(weights[i].format) > _bits(number) and weights[i].cols % _GROUP == 0:
            weights[i] = _replaced(weights[i], number, errors)
    return replace(program, weights=tuple(weights)), errors


def _bits(number: int) -> float:
    fmt = FORMATS[number]
    return 8 * fmt.nbytes / fmt.block


def _replaced(tensor: Tensor, number: int, errors: Errors) -> Tensor:
    fmt = FORMATS[number]
    nbytes = tensor.rows * tensor.cols // fmt.block * fmt.nbytes
    reads = tuple(partial(_made, tensor, expert, number, errors) for expert in range(tensor.experts))
    return replace(tensor, format=number, data=Pieces(nbytes, reads))


def _made(tensor: Tensor, expert: int, number: int, errors: Errors) -> U8:
    before = _floats(tensor, expert)
    if not np.isfinite(before).all():
        raise ValueError(f"expert {expert} has weights that are not finite")
    groups = before.reshape(-1, _GROUP)
    blocks, after = _int4(groups) if number == _Q4_0 else _int8(groups)
    errors.add(tensor.name, groups, after)
    return blocks.reshape(-1)


def _floats(tensor: Tensor, expert: int) -> F32:
    raw, rows = tensor.expert(expert), tensor.rows // tensor.experts
    values = as_floats(raw, tensor.format)
    if values is not None:
        return values
    if tensor.format not in GGUF_FORMATS:
        return dequantise(raw.reshape(rows, -1), tensor.format)
    from ktransformers.engine import _kernels

    pool = _kernels.ThreadPool(1)
    weight = _kernels.pack(pool, _kernels.isas()[0], tensor.format, rows, tensor.cols, raw.reshape(-1))
    return np.stack([weight.row(i) for i in range(rows)])


def _inverse(scale: F32) -> F32:
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)


def _int8(groups: F32) -> tuple[U8, F32]:
    """Q8_0 blocks of groups [n, 32], and what they mean."""
    scale = (np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float16)
    wide = scale.astype(np.float32)
    q = np.clip(np.rint(groups * _inverse(wide)), -127, 127).astype(np.int8)
    return np.concatenate((scale.view(np.uint8), q.view(np.uint8)), axis=1), q * wide


def _int4(groups: F32) -> tuple[U8, F32]:
    """Q4_0 blocks of groups [n, 32], and what they mean."""
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    scale = (largest / np.float32(-8)).astype(np.float16)
    wide = scale.astype(np.float32)
    q = np.clip(np.rint(groups * _inverse(wide)) + 8, 0, 15).astype(np.uint8)
    nibbles = q[:, :16] | q[:, 16:] << 4
    return np.concatenate((scale.view(np.uint8), nibbles), axis=1), (q.astype(np.float32) - 8) * wide
