"""The benchmark's arithmetic and its loads, on a model small enough to be made for a test."""

from pathlib import Path

import numpy as np
import pytest

from ktransformers.engine import _kernels
from ktransformers.engine.bench.bounds import bound, profile
from ktransformers.engine.bench.closed_loop import closed_loop
from ktransformers.engine.bench.loads import LOADS, STEP_TOKENS, Bench, Load, batch, greedy
from ktransformers.engine.bench.synthetic import QUANTS, SHAPES, Shape, write
from ktransformers.engine.limits import Limits
from ktransformers.engine.weights.gguf import read

SMALL = Shape("small", layers=2, width=256, ffn=512, heads=4, kv_heads=2, vocab=640, context=512)
LIMITS = Limits(_kernels.isas()[0], 1, {1: 1e9}, {"int8": 1e12, "bf16": 1e12, "f32": 1e12})
DECODE = Load("decode", streams=3, context=40)
PREFILL = Load("prefill", tokens=64)


@pytest.fixture(params=QUANTS)
def bench(request: pytest.FixtureRequest, tmp_path: Path):
    path = tmp_path / "small.gguf"
    write(path, SMALL, request.param)
    opened = Bench(str(path), 1, (DECODE, PREFILL), lambda done, total: None)
    yield opened
    opened.executor.close()


def test_a_random_model_runs(bench: Bench) -> None:
    assert bench.program.vocab == SMALL.vocab
    step = batch([(bench.tokens(0, 20), 0, np.arange(2, dtype=np.int32))])
    logits = bench.executor.logits(step)
    assert np.isfinite(logits).all() and 0.01 < logits.std() < 100
    assert 0 <= bench.executor.step(step, greedy(1)).token[0] < SMALL.vocab


def test_rates(bench: Bench) -> None:
    assert bench.fits(PREFILL) and bench.fits(DECODE) and not bench.fits(Load("prefill", tokens=4096))
    for load in (PREFILL, DECODE, DECODE, PREFILL):
        assert bench.rate(load, 0.0) > 0
    assert closed_loop(bench, clients=3, requests=2, prompt=30, output=5) > 0


def test_bounds(bench: Bench) -> None:
    """At a bandwidth this low every product waits for its weights, once a step whatever the tokens."""
    weights = sum(w.data.nbytes for w in bench.program.weights if w.rows > 1)
    assert bound(bench.program, LIMITS, DECODE) == pytest.approx(3 * 1e9 / weights, rel=0.05)
    assert bound(bench.program, LIMITS, PREFILL) == pytest.approx(64 * 1e9 / weights, rel=0.05)
    # And at a peak this low for two operations for each parameter and token; after the attention of the last
    # layer only for the rows that draw.
    slow = Limits(LIMITS.isa, 1, {1: 1e15}, {"int8": 1e6, "bf16": 1e6, "f32": 1e6})
    sizes = {w.name: w.rows * w.cols for w in bench.program.weights if w.rows > 1}
    last = [f"blk.{SMALL.layers - 1}.{n}.weight" for n in ("attn_output", "ffn_gate", "ffn_up", "ffn_down")]
    drawn = sum(size for name, size in sizes.items() if name in last or not name.startswith("blk."))
    every = sum(sizes.values()) - drawn
    assert bound(bench.program, slow, PREFILL) == pytest.approx(64e6 / (2 * (64 * every + drawn)), rel=0.01)
    assert bound(bench.program, slow, DECODE) == pytest.approx(1e6 / (2 * (every + drawn)), rel=0.01)


def test_profile(bench: Bench) -> None:
    for load in (PREFILL, DECODE):
        found = profile(bench, LIMITS, load, 2)
        assert [op.row.index for op in found.ops] == list(range(len(bench.program.ops)))
        assert all(op.seconds > 0 and op.bound >= 0 for op in found.ops)
        assert found.step > 0 and found.drawing > 0
    assert found.ops[-1].flops == 3 * 2 * SMALL.vocab * SMALL.width
    with pytest.raises(ValueError, match="one step"):
        profile(bench, LIMITS, Load("prefill", tokens=STEP_TOKENS + 1), 1)


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "cut.gguf"
    write(path, SMALL, "Q4_K", layers=1)
    tensors = read(str(path)).tensors
    assert "blk.0.ffn_down.weight" in tensors and "blk.1.ffn_down.weight" not in tensors
    assert [p.name for p in path.parent.iterdir()] == ["cut.gguf"]
    before = path.read_bytes()
    monkeypatch.setattr("ktransformers.engine.bench.synthetic.noise", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(path, SMALL, "Q8_0")
    assert path.read_bytes() == before


def test_names_tell_loads_apart() -> None:
    assert len({load.name for load in LOADS}) == len(LOADS)
    assert "qwen2.5-1.5b" in SHAPES
