"""What compiling any part of a model needs: values by their use, weights by their names, ops in order."""

import numpy as np

from ktransformers.engine.models.spec import ModelError, ModelSpec, RopeSpec
from ktransformers.engine.models.tensors import Tensors, f32_tensor
from ktransformers.engine.program import GatherRows, Linear, LinearPart, Op, RmsNorm, ValueId, WeightId
from ktransformers.engine.weights import names
from ktransformers.engine.weights.checkpoint import Checkpoint


class Compiler:
    """A program that is being written."""

    def __init__(self, spec: ModelSpec, file: Checkpoint) -> None:
        self.spec = spec
        self.tensors = Tensors(file)
        self.widths: list[int] = []
        self.ops: list[Op] = []
        self._values: dict[tuple[str, int, bool], ValueId] = {}
        self._drawn = False
        self._ropes: dict[RopeSpec, WeightId] = {}

    def value(self, use: str, width: int) -> ValueId:
        """The value of a use ("q", "gate", ...), shared by all layers as long as the rows are the same."""
        key = (use, width, self._drawn)
        if key not in self._values:
            self.widths.append(width)
            self._values[key] = len(self.widths) - 1
        return self._values[key]

    def gather(self, use: str, value: ValueId) -> ValueId:
        """The rows of a value that draw a token: from here on only these are computed."""
        self._drawn = True
        rows = self.value(use, self.widths[value])
        self.ops.append(GatherRows(value, rows))
        return rows

    def ones(self, n: int) -> WeightId:
        """The weight of a norm that has none."""
        name = f"ones.{n}"
        if name not in self.tensors.ids:
            self.tensors.add(f32_tensor(name, np.ones(n, np.float32)))
        return self.tensors.ids[name]

    def vocabulary(self) -> int:
        """Rows of the embedding, which must be as many as there are tokens."""
        info = self.tensors.file.tensors.get(names.EMBED)
        if info is None:
            raise ModelError(f"tensor '{names.EMBED}' is missing")
        tokens = self.tensors.file.tokens
        if not tokens:
            raise ModelError("the file has no vocabulary (key 'tokenizer.ggml.tokens')")
        if info.shape[0] != tokens:
            raise ModelError(f"tensor '{names.EMBED}' has {info.shape[0]} rows for {tokens} tokens")
        return tokens

    def norm(self, x: ValueId, name: str, out: ValueId, group: int) -> None:
        """Each `group` elements of x with the weight of that name."""
        self.ops.append(RmsNorm(x, self.tensors.vector(name, group), out, group, self.spec.eps))

    def linear(
        self,
        x: ValueId,
        layer: int,
        *outs: tuple[str, ValueId],
        needs_bias: bool = False,
        precise: bool = False,
    ) -> None:
        """One Linear for all products of the same input."""
        parts = []
        for name, out in outs:
            rows = self.widths[out]
            weight = self.tensors.matrix(names.weight(layer, name), rows, self.widths[x])
            bias = names.bias(layer, name)
            has_bias = needs_bias or self.tensors.has(bias)
            parts.append(LinearPart(weight, self.tensors.vector(bias, rows) if has_bias else None, out))
        self.ops.append(Linear(x, tuple(parts), precise))

    def inv_freq(self, rope: RopeSpec) -> WeightId:
        """The frequencies of a rope, with the file's own factors if it has them."""
        if rope not in self._ropes:
            divisors = None
            if rope == self.spec.rope and self.tensors.has(names.ROPE_FREQS):
                divisors = self.tensors.floats(names.ROPE_FREQS, rope.dims // 2)
                if not (np.isfinite(divisors) & (divisors > 0)).all():
                    raise ModelError(f"tensor '{names.ROPE_FREQS}' holds values that are not positive")
                self.tensors.ids[names.ROPE_FREQS] = -1
            tensor = f32_tensor(f"rope.inv_freq.{len(self._ropes)}", rope.inv_freq(divisors))
            self._ropes[rope] = self.tensors.add(tensor)
        return self._ropes[rope]
