"""The native executor against float32 on real text: what int8 activations and bfloat16 attention cost.

Roundings of equal accuracy differ in perplexity by chance, relatively by sqrt(2 KL / positions): on one short
text that is as much as they cost. So all that is asserted is of two texts together.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from speaking import write

from ktransformers.engine.batch import Batch, Executor
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.load import open_model

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Figures:
    """Of one engine: mean KL divergence from float32, share of positions where the likeliest token is its,
    and perplexity."""

    positions: int
    kl: float
    top1: float
    perplexity: float


# What llama.cpp gets. From the repository's root, for each text:
#   python tests/bench/fidelity.py --text TEXT --positions POSITIONS --peer-python PYTHON_WITH_LLAMA_CPP
# prose.txt is what the repository's own pages were at one time; it does not follow them.
LLAMACPP = {
    HERE.parents[1] / "LICENSE": Figures(2048, 0.00375, 0.9648, 13.822),
    HERE / "prose.txt": Figures(6000, 0.00333, 0.9570, 40.570),
}


def pooled(figures: list[Figures]) -> Figures:
    n = sum(f.positions for f in figures)
    return Figures(
        n,
        sum(f.positions * f.kl for f in figures) / n,
        sum(f.positions * f.top1 for f in figures) / n,
        math.exp(sum(f.positions * math.log(f.perplexity) for f in figures) / n),
    )


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


def compare(native: Executor, exact: Executor, tokens: list[int]) -> tuple[Figures, Figures]:
    """The figures of `native`, and those of `exact`, on all tokens but the last."""
    divergence, same, loss_native, loss_exact, seen = 0.0, 0, 0.0, 0.0, 0
    for ours, theirs in zip(chunks(native, tokens[:-1]), chunks(exact, tokens[:-1]), strict=True):
        p, q = log_softmax(theirs), log_softmax(ours)
        divergence += float((np.exp(p) * (p - q)).sum())
        same += int((theirs.argmax(1) == ours.argmax(1)).sum())
        rows = np.arange(len(p))
        target = np.array(tokens[seen + 1 : seen + 1 + len(p)])
        loss_exact -= float(p[rows, target].sum())
        loss_native -= float(q[rows, target].sum())
        seen += len(p)
    return (
        Figures(seen, divergence / seen, same / seen, math.exp(loss_native / seen)),
        Figures(seen, 0.0, 1.0, math.exp(loss_exact / seen)),
    )


@pytest.mark.timeout(900)
def test_native_against_float32(native_executor, torch_executor, default_tokenizer) -> None:
    ours, exact = [], []
    for text, theirs in LLAMACPP.items():
        tokens = default_tokenizer.encode(text.read_text())[: theirs.positions + 1]
        assert len(tokens) == theirs.positions + 1
        found, oracle = compare(native_executor, torch_executor, tokens)
        print(f"{text.name}: {found}, float32 {oracle.perplexity:.3f}, llama.cpp {theirs}")
        ours.append(found)
        exact.append(oracle)
    native, oracle, peer = pooled(ours), pooled(exact), pooled(list(LLAMACPP.values()))
    print(f"together: {native}, float32 {oracle.perplexity:.3f}, llama.cpp {peer}")
    assert native.kl <= 0.0025
    assert native.kl <= peer.kl
    assert native.top1 >= peer.top1
    assert native.perplexity <= peer.perplexity
    # What is lost is the divergence, but for chance: three standard deviations of it.
    loss = math.log(native.perplexity / oracle.perplexity)
    assert abs(loss - native.kl) <= 3 * math.sqrt(2 * native.kl / native.positions)


def test_experts_against_float32(default_tokenizer, tmp_path: Path) -> None:
    """The default model cut into experts, whose weights a router says. (Of routers that leave experts out:
    engine/test_expert_fidelity.py)"""
    program, _ = open_model(EngineConfig(model=str(write(tmp_path / "moe.gguf", "routed"))))
    tokens = default_tokenizer.encode((HERE.parents[1] / "LICENSE").read_text())[:641]
    native = NativeExecutor(program, threads=2, blocks=40, max_tokens=256, max_rows=256)
    exact = TorchExecutor(program, threads=2, blocks=40, block_tokens=16, max_tokens=256)
    found, oracle = compare(native, exact, tokens)
    native.close()
    exact.close()
    print(f"experts: {found}, float32 {oracle.perplexity:.3f}")
    assert oracle.perplexity < 20, "it speaks"
    assert found.kl <= 0.004
    assert found.top1 >= 0.96
