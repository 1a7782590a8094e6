"""What the arithmetic of an engine changes: logits of ours and of llama.cpp against float32.

The first positions of the licence, teacher-forced; the oracle is the torch executor on the same weights.
Printed: the mean KL divergence from it, how often the likeliest token is the same, and perplexity.

    python tests/bench/fidelity.py --peer-python build/peer/bin/python
"""

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from ktransformers.engine import _kernels
from ktransformers.engine.bench.loads import STEP_TOKENS, batch
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.load import open_model
from ktransformers.kvcache.config import KvFormat
from ktransformers.server.library import resolve
from ktransformers.server.text.model import TextModel

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I32 = npt.NDArray[np.int32]


@dataclass
class Fidelity:
    """Of one engine, over all positions."""

    kl: float
    """Mean of sum(p log(p / q)), p the oracle's distribution and q the engine's, in nats."""
    top1: float
    """Share of positions where the likeliest token is the oracle's."""
    perplexity: float
    """exp of the mean negative log-likelihood of the text's next token."""


def log_softmax(logits: F32) -> F64:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def steps(executor: NativeExecutor | TorchExecutor, tokens: I32) -> Iterator[F32]:
    """Logits of every position, a step of a prompt at a time."""
    table = np.arange(-(-len(tokens) // executor.block_tokens), dtype=np.int32)
    for begin in range(0, len(tokens), STEP_TOKENS):
        part = tokens[begin : begin + STEP_TOKENS]
        one = batch([(part, begin, table)])
        every = np.arange(len(part), dtype=np.int32)
        yield executor.logits(type(one)(**{**vars(one), "logit_rows": every}))


def compare(oracle: list[F64], other: Iterator[F32], text: I32) -> Fidelity:
    """The oracle's log-probabilities against another's logits, chunk by chunk."""
    kl, same, likelihood, at = 0.0, 0, 0.0, 0
    for p, logits in zip(oracle, other, strict=True):
        q = log_softmax(logits)
        kl += float((np.exp(p) * (p - q)).sum())
        same += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        likelihood += float(q[np.arange(len(q)), text[at + 1 : at + 1 + len(q)]].sum())
        at += len(q)
    return Fidelity(kl / at, same / at, float(np.exp(-likelihood / at)))


def llamacpp(python: str, model: Path, threads: int, tokens: I32, folder: Path) -> Iterator[F32]:
    np.save(folder / "tokens.npy", tokens)
    files = [str(folder / "tokens.npy"), str(folder / "logits.npy")]
    command = [python, str(HERE / "fidelity_llamacpp.py"), str(model), str(threads), *files]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    logits = np.load(files[1], mmap_mode="r")
    for begin in range(0, len(tokens), STEP_TOKENS):
        yield np.array(logits[begin : begin + STEP_TOKENS])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="")
    parser.add_argument("--text", type=Path, default=ROOT / "LICENSE")
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peer-python", help="a python with llama_cpp; without it, ours alone")
    parser.add_argument("--isas", default=_kernels.isas()[0], help="kernel tables, by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fidelity.json")
    given = parser.parse_args()
    model = resolve(given.model)
    program, _ = open_model(EngineConfig(model=str(model)))
    encoded = TextModel.from_gguf(model).tokenizer.encode(given.text.read_text())
    text = np.array(encoded[: given.positions + 1], np.int32)
    tokens = text[:-1]
    blocks = -(-len(tokens) // 16)

    torch = TorchExecutor(
        program,
        blocks=blocks,
        block_tokens=16,
        max_tokens=STEP_TOKENS,
        device="cpu",
        threads=given.threads,
        progress=lambda done, total: None,
    )
    oracle = [log_softmax(logits) for logits in steps(torch, tokens)]
    del torch
    found = {"float32 (oracle)": compare(oracle, (p.astype(np.float32) for p in oracle), text)}

    def ours(isa: str, kv_format: KvFormat) -> Iterator[F32]:
        native = NativeExecutor(
            program,
            isa=isa,
            threads=given.threads,
            blocks=blocks,
            max_tokens=STEP_TOKENS,
            max_rows=STEP_TOKENS,
            kv_format=kv_format,
        )
        yield from steps(native, tokens)
        native.close()

    for isa in given.isas.split(","):
        found[f"ktransformers, {isa}"] = compare(oracle, ours(isa, "bf16"), text)
        found[f"ktransformers, {isa}, int8 KV"] = compare(oracle, ours(isa, "int8"), text)
        sixteen = [log_softmax(logits) for logits in ours(isa, "bf16")]
        found["  that against bfloat16 KV"] = compare(sixteen, ours(isa, "int8"), text)
    if given.peer_python:
        with tempfile.TemporaryDirectory() as folder:
            logits = llamacpp(given.peer_python, model, given.threads, tokens, Path(folder))
            found["llama.cpp"] = compare(oracle, logits, text)

    table = Table(f"{len(tokens)} positions", "mean KL", "top-1", "perplexity", box=None, pad_edge=False)
    for name, f in found.items():
        table.add_row(name, f"{f.kl:.5f}", f"{f.top1:.2%}", f"{f.perplexity:.3f}")
    Console(highlight=False).print(table)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({name: asdict(f) for name, f in found.items()}, indent=1))


if __name__ == "__main__":
    main()
