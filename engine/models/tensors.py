"""Takes the tensors of a model out of its files, each with the shape that the spec says."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.program import U8, Pieces, Tensor, WeightId
from ktransformers.engine.weights import names
from ktransformers.engine.weights.checkpoint import Checkpoint, StoredTensor
from ktransformers.engine.weights.formats import (
    F8_E4M3,
    F32,
    FORMATS,
    I4_32,
    I4_128,
    I4Z_32,
    I4Z_128,
    as_floats,
)

COMPUTED_FORMATS: Final = frozenset({0, 1, 2, 3, 6, 7, 8, 39, F8_E4M3, I4_32, I4_128, I4Z_32, I4Z_128}) | {
    *range(10, 15),
    *range(16, 24),
    *(29, 30),
}
"""Formats that a matrix may have: of GGUF's F32, F16, BF16, Q4_0 to Q8_0, Q2_K to Q6_K, IQ1_S to IQ4_XS and
MXFP4; all of ours."""


@dataclass
class Tensors:
    """The weights that were taken so far. ModelError for what is missing, of another shape or format."""

    file: Checkpoint
    weights: list[Tensor] = field(default_factory=list)
    ids: dict[str, WeightId] = field(default_factory=dict)
    """By name, of the tensors that were taken; -1 for one that became part of another."""

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def add(self, tensor: Tensor) -> WeightId:
        self.ids[tensor.name] = len(self.weights)
        self.weights.append(tensor)
        return self.ids[tensor.name]

    def matrix(self, name: str, rows: int, cols: int) -> WeightId:
        """Weights as they are in the file; a tied one is taken once."""
        if name not in self.ids:
            return self.add(self._stored(name, (rows, cols), 1))
        self._info(name, (rows, cols))
        return self.ids[name]

    def rows(self, name: str, total: int, cols: int, begin: int, end: int) -> WeightId:
        """Rows [begin, end) of a matrix of `total` rows."""
        whole = self._stored(name, (total, cols), 1)

        def part() -> U8:
            out: U8 = whole.read().reshape(total, -1)[begin:end].reshape(-1)
            return out

        nbytes = whole.data.nbytes // total * (end - begin)
        data = Pieces(nbytes, (part,)) if isinstance(whole.data, Pieces) else part()
        self.ids[name] = -1
        return self.add(Tensor(f"{name}[{begin}:{end}]", whole.format, end - begin, cols, data))

    def picked(self, name: str, total: int, cols: int, rows: npt.NDArray[np.intp], part: str) -> WeightId:
        """Those rows of a matrix of `total` rows, as tensor `part`: of heads that lie one behind another."""
        whole = self._stored(name, (total, cols), 1)

        def pick() -> U8:
            out: U8 = whole.read().reshape(total, -1)[rows].reshape(-1)
            return out

        self.ids[name] = -1
        data = Pieces(whole.data.nbytes // total * len(rows), (pick,))
        return self.add(Tensor(part, whole.format, len(rows), cols, data))

    def experts(self, name: str, experts: int, rows: int, cols: int) -> WeightId:
        """Weights of all experts (or heads), a tensor of three dimensions."""
        return self.add(self._stored(name, (experts, rows, cols), experts))

    def expert_biases(self, name: str, experts: int, rows: int) -> WeightId:
        """F32 [experts, rows]."""
        return self.add(f32_tensor(name, self._floats(name, (experts, rows))))

    def vector(self, name: str, n: int) -> WeightId:
        """Norm weights and biases as F32 [1, n]."""
        return self.add(f32_tensor(name, self.floats(name, n)))

    def table(self, name: str, values: npt.NDArray[np.float32]) -> WeightId:
        """F32 values that were made of the tensor of that name."""
        return self.add(f32_tensor(name, values))

    def floats(self, name: str, *shape: int) -> npt.NDArray[np.float32]:
        """The values of a vector, or of a small matrix."""
        return self._floats(name, shape)

    def skip_layer(self, layer: int) -> None:
        """Tensors of a layer that is not used."""
        prefix = names.weight(layer, "").removesuffix(".weight")
        self.ids.update({name: -1 for name in self.file.tensors if name.startswith(prefix)})

    def refuse_unused(self, architecture: str) -> None:
        """A tensor that nobody took may change the mathematics."""
        unused = [name for name in self.file.tensors if name not in self.ids]
        if unused:
            some = ", ".join(ascii(name[:64]) for name in unused[:3])
            raise ModelError(f"{len(unused)} tensors are unknown in a {architecture} model: {some}")

    def _info(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        info = self.file.tensors.get(name)
        if info is None:
            raise ModelError(f"tensor '{name}' is missing")
        if info.shape != shape:
            raise ModelError(f"tensor '{name}' has shape {list(info.shape)}; the metadata says {list(shape)}")
        return info

    def _stored(self, name: str, shape: tuple[int, ...], experts: int) -> Tensor:
        info = self._info(name, shape)
        if info.format not in COMPUTED_FORMATS:
            supported = ", ".join(FORMATS[f].name for f in sorted(COMPUTED_FORMATS))
            what = f"has format {FORMATS[info.format].name}, which is not supported"
            raise ModelError(f"tensor '{name}' {what}; supported are {supported}")
        rows = shape[0] if experts == 1 else shape[0] * shape[1]
        return Tensor(name, info.format, rows, shape[-1], self.file.tensor_bytes(name), experts)

    def _floats(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        info = self._info(name, shape)
        raw = Tensor(name, info.format, 1, int(np.prod(shape)), self.file.tensor_bytes(name)).read()
        values = as_floats(raw, info.format)
        if values is None:
            what = FORMATS[info.format].name
            raise ModelError(f"tensor '{name}' has format {what}; F32, F16 or BF16 is expected")
        return values.reshape(shape)


def f32_tensor(name: str, values: npt.NDArray[np.float32]) -> Tensor:
    """Floats as a weight: a row [1, n] of a vector."""
    rows, cols = (1, len(values)) if values.ndim == 1 else values.shape
    return Tensor(name, F32, rows, cols, np.ascontiguousarray(values).reshape(-1).view(np.uint8))
