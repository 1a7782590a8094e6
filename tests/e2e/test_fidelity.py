"""The native executor against float32 on real text: what int8 activations and float16 KV cost."""

import math
from pathlib import Path

import numpy as np
import pytest

from ktransformers.engine.batch import Batch, Executor

LICENCE = Path(__file__).resolve().parents[2] / "LICENSE"
POSITIONS = 2048
# llama.cpp on the same positions, as tests/bench/fidelity.py --peer-python prints it.
LLAMACPP_KL, LLAMACPP_TOP1, LLAMACPP_PERPLEXITY = 0.00375, 0.9648, 13.822


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def chunks(executor: Executor, tokens: list[int], size: int = 256):
    """Logits of every position, chunk by chunk, of one sequence."""
    blocks = np.arange(-(-len(tokens) // executor.block_tokens), dtype=np.int32)
    for begin in range(0, len(tokens), size):
        part = np.array(tokens[begin : begin + size], np.int32)
        yield executor.logits(
            Batch(
                tokens=part,
                starts=np.array([0, len(part)], np.int32),
                context=np.array([begin], np.int32),
                block_starts=np.array([0, len(blocks)], np.int32),
                blocks=blocks,
                logit_rows=np.arange(len(part), dtype=np.int32),
            )
        )


@pytest.mark.timeout(600)
def test_native_against_float32(default_program, native_executor, torch_executor, default_tokenizer) -> None:
    tokens = default_tokenizer.encode(LICENCE.read_text())[: POSITIONS + 1]
    assert len(tokens) == POSITIONS + 1
    divergence, same, loss_native, loss_exact, seen = 0.0, 0, 0.0, 0.0, 0
    moved: list[np.ndarray] = []
    for native, exact in zip(
        chunks(native_executor, tokens[:-1]), chunks(torch_executor, tokens[:-1]), strict=True
    ):
        p, q = log_softmax(exact), log_softmax(native)
        divergence += float((np.exp(p) * (p - q)).sum())
        same += int((exact.argmax(1) == native.argmax(1)).sum())
        rows = np.arange(len(p))
        target = np.array(tokens[seen + 1 : seen + 1 + len(p)])
        loss_exact -= float(p[rows, target].sum())
        loss_native -= float(q[rows, target].sum())
        moved.append(p[rows, target] - q[rows, target])
        seen += len(p)
    exact_ppl, native_ppl = math.exp(loss_exact / seen), math.exp(loss_native / seen)
    # How far perplexity strays by chance, relative: roundings of equal accuracy differ by as much.
    chance = float(np.concatenate(moved).std()) / math.sqrt(seen)
    print(
        f"{seen} positions: mean KL {divergence / seen:.5f}, top-1 {same / seen:.2%}, "
        f"perplexity {native_ppl:.3f} against {exact_ppl:.3f}, by chance {chance:.2%}"
    )
    assert divergence / seen <= 0.004
    assert same / seen >= 0.96
    assert abs(native_ppl / exact_ppl - 1) <= 0.003
    assert divergence / seen <= LLAMACPP_KL
    assert same / seen >= LLAMACPP_TOP1
    assert native_ppl <= LLAMACPP_PERPLEXITY * (1 + chance)
