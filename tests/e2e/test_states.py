"""Law 1 for models whose sequences have a state beside their KV, and one of them served.

A small random Qwen3-Next with the production scheduler, runner and native executor: whatever the batch, the
chunk, the hit or the preemption, the bits are those of the request alone.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoints
import httpx
import pytest
import speaking_folder
from stack import SLOTS, Answer, Prompts, Stack, check

from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.models.decoder import compile_program
from ktransformers.engine.models.folder import open_folder
from ktransformers.engine.program import Program
from ktransformers.engine.protocol import Sampling
from ktransformers.engine.weights.gguf import read


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    folder = tmp_path_factory.mktemp("model")
    case = checkpoints.QWEN3_NEXT
    checkpoints.build(replace(case, config={**case.config, "max_position_embeddings": 2048})).save_pretrained(
        folder
    )
    model = open_folder(folder)
    return compile_program(model.spec, model)


def native(program: Program, kept: int) -> NativeExecutor:
    return NativeExecutor(
        program, threads=2, blocks=512, max_tokens=512, max_rows=512, states=SLOTS + kept
    )


@pytest.fixture(scope="module")
def executor(program: Program) -> NativeExecutor:
    return native(program, 64)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    """Some with a long common beginning; a half is sampled."""
    rng = random.Random(3)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(3, checkpoints.VOCAB) for _ in range(n)]

    common = tokens(70)
    found = {}
    for i in range(30):
        prompt = (common if i % 3 == 0 else []) + tokens(rng.choice((1, 5, 16, 48, 130, 250)))
        sampling = Sampling(
            temperature=float(i % 2), seed=i, max_tokens=rng.choice((1, 6, 20, 60)), logprobs=3
        )
        found[f"r{i}"] = (prompt, sampling)
    return found


@pytest.fixture(scope="module")
def alone(executor: NativeExecutor, prompts: Prompts) -> dict[str, Answer]:
    answers = {}
    for name, (tokens, sampling) in prompts.items():
        stack = Stack(executor, chunk=512, reuse=False)
        stack.submit(name, tokens, sampling)
        answers |= stack.run()
    return answers


@pytest.mark.parametrize("chunk", [7, 64, 512])
@pytest.mark.parametrize("reuse", [False, True])
def test_all_together(
    executor: NativeExecutor, prompts: Prompts, alone: dict[str, Answer], chunk: int, reuse: bool
) -> None:
    stack = Stack(executor, chunk=chunk, reuse=reuse)
    for name, (tokens, sampling) in prompts.items():
        stack.submit(name, tokens, sampling)
    check(stack.run(), alone)


@pytest.mark.parametrize("chunk", [48, 512])
def test_prefix_hits(
    executor: NativeExecutor, prompts: Prompts, alone: dict[str, Answer], chunk: int
) -> None:
    stack = Stack(executor, chunk=chunk)
    for _ in range(2):
        for name, (tokens, sampling) in prompts.items():
            stack.submit(name, tokens, sampling)
            stack.run()
        check(stack.answers, alone)
    hits = stack.scheduler.status().prefix_hit_tokens
    assert hits >= 0.7 * sum(len(tokens) for tokens, _ in prompts.values())


def test_conversations(
    program: Program, executor: NativeExecutor, prompts: Prompts, alone: dict[str, Answer]
) -> None:
    """Second turns, which begin with the state of the first prompt."""
    second = {name: ([*t, *alone[name].tokens, 5, 6, 7], s) for name, (t, s) in prompts.items()}
    fresh = {}
    for name, (tokens, sampling) in second.items():
        one = Stack(native(program, 0), chunk=512, reuse=False)
        one.submit(name, tokens, sampling)
        fresh |= one.run()
    stack = Stack(executor, chunk=512)
    for turn in (prompts, second):
        for name, (tokens, sampling) in turn.items():
            stack.submit(name, tokens, sampling)
        stack.run()
    check(stack.answers, fresh)
    assert stack.scheduler.status().prefix_hit_tokens > 1000


@pytest.mark.parametrize("kept", [1, 5])
def test_few_places_for_copies(
    program: Program, prompts: Prompts, alone: dict[str, Answer], kept: int
) -> None:
    stack = Stack(native(program, kept), chunk=64)
    for _ in range(2):
        for name, (tokens, sampling) in prompts.items():
            stack.submit(name, tokens, sampling)
        check(stack.run(), alone)


def test_forced_preemption(executor: NativeExecutor) -> None:
    """Everybody is thought to stop at once, and together they outgrow the pool."""
    prompts = {
        f"r{i}": ([3 + (i * j) % 90 for j in range(20 + 7 * i)], Sampling(seed=i, max_tokens=90, logprobs=3))
        for i in range(10)
    }
    alone = {}
    for name, prompt in prompts.items():
        one = Stack(executor, chunk=512, reuse=False)
        one.submit(name, *prompt)
        alone |= one.run()
    stack = Stack(executor, chunk=48, blocks=40)
    stack.scheduler._estimate.prior = 0.0
    for name, prompt in prompts.items():
        stack.submit(name, *prompt)
    check(stack.run(), alone)
    assert stack.scheduler.status().preemptions > 0


def test_served(
    default_model: Path, start: Callable[..., Any], tmp_path: Path
) -> None:
    """From a folder with the default model's tokenizer: twice the same answer, the second time by a hit."""
    text = read(default_model)
    folder = tmp_path / "tiny-qwen3-next"
    folder.mkdir()
    case = checkpoints.QWEN3_NEXT
    checkpoints.build(
        replace(case, config={**case.config, "vocab_size": text.tokens, "max_position_embeddings": 2048})
    ).save_pretrained(folder)
    speaking_folder.write_text(folder, text)
    server = start(model=folder)
    prompt = "A lighthouse, and another one. " * 12
    ask = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "model": folder.name}
    answers = [httpx.post(f"{server.url}/v1/completions", json=ask, timeout=60).json() for _ in range(2)]
    first, second = (answer["usage"] for answer in answers)
    assert answers[0]["choices"] == answers[1]["choices"]
    assert first["prompt_tokens"] > 64
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] == (second["prompt_tokens"] - 1) // 16 * 16
