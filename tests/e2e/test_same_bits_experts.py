"""Law 1 for every architecture with experts or latent attention, on every instruction set.

As test_same_bits.py, with small random checkpoints: prompts are answered alone, and then all together in
chunks, from the prefix cache and after preemption. In integer formats all instruction sets give the same
bits.
"""

import random
from typing import Any

import gguf
import pytest
from checkpoints import VOCAB, build, load
from converters import convert
from quantised_programs import in_formats
from stack import Answer, Prompts, Stack, check
from test_expert_architectures import CASES

from ktransformers.engine import _kernels
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.program import Program
from ktransformers.engine.protocol import Sampling

ISAS = [*_kernels.isas(), *_kernels.emulated_isas()]
CHUNK = 128
BLOCKS = 64
FEW = 14
"""Blocks that do not hold all prompts with their answers."""


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """Of 1 to 80 tokens, some with a common beginning of three blocks; half of them sampled."""
    rng = random.Random(11)

    def text(n: int) -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(n)]

    common = text(48)
    found: Prompts = {}
    for i in range(12):
        tokens = (common if i % 3 == 0 else []) + text(rng.choice((1, 7, 20, 32)))
        sampled = {"temperature": 1.0, "top_k": rng.choice((0, 20)), "seed": rng.randrange(2**63)}
        settings: dict[str, Any] = sampled if i % 2 else {"temperature": 0.0}
        found[f"r{i}"] = (tokens, Sampling(**settings, max_tokens=rng.choice((4, 12, 24)), logprobs=2))
    return found


@pytest.fixture(scope="module", params=list(CASES))
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """In float32."""
    case = CASES[str(request.param)]
    return load(convert(case, build(case), tmp_path_factory.mktemp("model") / "m.gguf"))[1]


def answered_alone(executor: NativeExecutor, prompts: Prompts) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for name, (tokens, sampling) in prompts.items():
        stack = Stack(executor, chunk=CHUNK, blocks=BLOCKS, reuse=False, vocab=VOCAB)
        stack.submit(name, tokens, sampling)
        answers |= stack.run()
        stack.close()
    return answers


def together(executor: NativeExecutor, prompts: Prompts, alone: dict[str, Answer]) -> None:
    """In chunks of 16 tokens shared by all; then twice, so that all beginnings are found in the cache."""
    for chunk, times in ((16, 1), (CHUNK, 2)):
        stack = Stack(executor, chunk=chunk, blocks=BLOCKS, reuse=times > 1, vocab=VOCAB)
        for _ in range(times):
            for name, (tokens, sampling) in prompts.items():
                stack.submit(name, tokens, sampling)
            check(stack.run(), alone)
        if times > 1:
            assert stack.scheduler.status().prefix_hit_tokens > 300
        stack.close()


def preempted(executor: NativeExecutor, prompts: Prompts, alone: dict[str, Answer]) -> None:
    stack = Stack(executor, chunk=CHUNK, blocks=FEW, vocab=VOCAB)
    stack.expect_short_answers(60)
    for name, (tokens, sampling) in prompts.items():
        stack.submit(name, tokens, sampling)
    check(stack.run(), alone)
    assert stack.scheduler.status().preemptions > 0
    stack.close()


def native(program: Program, isa: str, **settings: Any) -> NativeExecutor:
    return NativeExecutor(
        program, isa=isa, threads=2, blocks=BLOCKS, max_tokens=CHUNK, max_rows=64, **settings
    )


def test_integer_formats_on_every_instruction_set(program: Program, prompts: Prompts) -> None:
    """Experts of four bits, the rest of eight: the answers are the same everywhere."""
    ours = in_formats(program, "Q8_0", "Q4_0")
    assert any(t.format == gguf.GGMLQuantizationType.Q4_0 for t in ours.weights)
    executor = native(ours, ISAS[0])
    alone = answered_alone(executor, prompts)
    assert len({tuple(a.tokens) for a in alone.values()}) > len(alone) / 2, "it says different things"
    for isa in ISAS:
        if isa != ISAS[0]:
            executor.close()
            executor = native(ours, isa)
        together(executor, prompts, alone)
        preempted(executor, prompts, alone)
    executor.close()


@pytest.mark.parametrize("isa", [*_kernels.isas()[:2], *_kernels.emulated_isas()])
def test_sixteen_bits(program: Program, prompts: Prompts, isa: str) -> None:
    """The product of bfloat16 has an order of sums of its own on each instruction set that has one."""
    executor = native(in_formats(program, "BF16", "BF16"), isa)
    alone = answered_alone(executor, prompts)
    together(executor, prompts, alone)
    executor.close()
