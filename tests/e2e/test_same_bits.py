"""Law 1: a request's tokens and log-probabilities are the same bits, whoever runs beside it.

The production scheduler, runner and native executor with the default model, without sockets: 50 prompts,
greedy and sampled, are answered alone, and then all together in every way that the scheduler has of running
them.
"""

import random
from pathlib import Path

import pytest
from stack import BLOCKS, Answer, Prompts, Stack, check

from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.program import Program
from ktransformers.engine.protocol import Sampling
from ktransformers.kvcache.blocks import Tier
from ktransformers.kvcache.stores.disk import DiskStore


@pytest.fixture(scope="module")
def prompts(default_tokenizer) -> Prompts:
    """50 prompts of 1 to 300 tokens, some with a long common beginning; half of them sampled in all ways."""
    rng = random.Random(7)
    common = default_tokenizer.encode(
        "You are the keeper of a lighthouse and answer each question with a story. " * 5
    )
    words = [
        "sea",
        "storm",
        "lamp",
        "ship",
        "night",
        "gull",
        "rock",
        "letter",
        "captain",
        "fog",
        "bell",
        "keeper",
        "rope",
    ]
    found: Prompts = {}
    for i in range(50):
        text = " ".join(rng.choice(words) for _ in range(rng.choice((1, 5, 30, 120, 250))))
        tokens = (common if i % 3 == 0 else []) + default_tokenizer.encode(text)
        if i % 2:
            sampling = Sampling(
                temperature=rng.choice((0.5, 1.0, 1.5)),
                top_k=rng.choice((0, 5, 40)),
                top_p=rng.choice((1.0, 0.9)),
                min_p=rng.choice((0.0, 0.05)),
                repetition_penalty=rng.choice((1.0, 1.2)),
                presence_penalty=rng.choice((0.0, 0.5)),
                seed=rng.randrange(2**63),
                max_tokens=rng.choice((1, 6, 12, 60)),
                logprobs=3,
            )
        else:
            sampling = Sampling(temperature=0.0, max_tokens=rng.choice((1, 6, 12, 60)), logprobs=2)
        found[f"r{i}"] = (tokens, sampling)
    return found


@pytest.fixture(scope="module")
def alone(native_executor, prompts: Prompts) -> dict[str, Answer]:
    """Each prompt on a stack that never saw another, its whole prompt in one step."""
    answers = {}
    for name, (tokens, sampling) in prompts.items():
        stack = Stack(native_executor, chunk=512, reuse=False)
        stack.submit(name, tokens, sampling)
        answers |= stack.run()
    assert sum(len(a.tokens) for a in answers.values()) > 300
    return answers


@pytest.mark.parametrize("chunk", [16, 64, 512])
@pytest.mark.parametrize("reuse", [False, True])
def test_all_together(
    native_executor, prompts: Prompts, alone: dict[str, Answer], chunk: int, reuse: bool
) -> None:
    stack = Stack(native_executor, chunk=chunk, reuse=reuse)
    for name, (tokens, sampling) in prompts.items():
        stack.submit(name, tokens, sampling)
    check(stack.run(), alone)


@pytest.mark.parametrize("seed", range(2))
def test_random_arrivals(native_executor, prompts: Prompts, alone: dict[str, Answer], seed: int) -> None:
    rng = random.Random(seed)
    stack = Stack(native_executor, chunk=64)
    order = list(prompts)
    rng.shuffle(order)
    for name in order:
        stack.submit(name, *prompts[name])
        for _ in range(rng.randrange(6)):
            stack.step()
    check(stack.run(), alone)


def test_prefix_hits(native_executor, prompts: Prompts, alone: dict[str, Answer]) -> None:
    """Twice on one stack: the second time every full block of every prompt is found in the cache."""
    stack = Stack(native_executor, chunk=512, blocks=BLOCKS)
    for name, (tokens, sampling) in prompts.items():
        stack.submit(name, tokens, sampling)
    check(stack.run(), alone)
    before = stack.scheduler.status().prefix_hit_tokens
    for name, (tokens, sampling) in prompts.items():
        stack.submit(name, tokens, sampling)
        stack.run()
    check(stack.answers, alone)
    hits = stack.scheduler.status().prefix_hit_tokens - before
    assert hits >= 0.5 * sum(len(tokens) for tokens, _ in prompts.values())


def test_forced_preemption(native_executor, prompts: Prompts, alone: dict[str, Answer]) -> None:
    stack = Stack(native_executor, chunk=512, blocks=40)
    stack.expect_short_answers(200)
    for name, (tokens, sampling) in prompts.items():
        stack.submit(name, tokens, sampling)
    check(stack.run(), alone)
    assert stack.scheduler.status().preemptions > 0


def test_in_the_middle_of_others(native_executor, prompts: Prompts, alone: dict[str, Answer]) -> None:
    """Half of them come while steps of the other half are being computed, and do not wait for their end."""
    stack = Stack(native_executor, chunk=512, urgent=True)
    names = list(prompts)
    later = names[25:]

    def come() -> None:
        if later and stack.scheduler.status().steps > 30:
            name = later.pop()
            stack.submit(name, *prompts[name])

    stack.between = come
    for name in names[:25]:
        stack.submit(name, *prompts[name])
        stack.step()
    answers = stack.run()
    for name in later:
        stack.submit(name, *prompts[name])
    check(stack.run() if later else answers, alone)
    assert stack.urgent_steps >= 5


# ---- from other tiers

FEW = 32
"""Blocks of a device pool that holds a fifth of what the prompts below have."""
FINGERPRINT = bytes(32)


@pytest.fixture(scope="module")
def some(prompts: Prompts) -> Prompts:
    """Of the prompts the first few, among them all kinds."""
    return dict(list(prompts.items())[:16])


@pytest.fixture(scope="module")
def expected(some: Prompts, alone: dict[str, Answer]) -> dict[str, Answer]:
    return {name: alone[name] for name in some}


def ask_each(stack: Stack, some: Prompts, times: int = 1) -> None:
    """One after another, each `times` times in a row."""
    for name, (tokens, sampling) in some.items():
        for _ in range(times):
            stack.submit(name, tokens, sampling)
            stack.run()


def most_tokens(some: Prompts) -> float:
    """Hits that can be called most of what the prompts have."""
    return 0.5 * sum(len(tokens) for tokens, _ in some.values())


def test_hits_on_the_host(native_executor, some: Prompts, expected: dict[str, Answer]) -> None:
    stack = Stack(native_executor, chunk=512, blocks=FEW, host_blocks=1024)
    ask_each(stack, some)
    check(stack.answers, expected)
    before = stack.cache.hit_tokens[Tier.HOST]
    ask_each(stack, some)
    check(stack.answers, expected)
    assert stack.cache.hit_tokens[Tier.HOST] - before > most_tokens(some)
    stack.close()


def test_hits_on_disk_and_after_a_restart(
    native_executor, default_program: Program, some: Prompts, expected: dict[str, Answer], tmp_path: Path
) -> None:
    """The second time each is found on the device, and written; the third time it is read. Then all is new
    but the disk: another executor, with one thread, and another scheduler."""
    executor = native_executor
    for life in range(2):
        disk = DiskStore.open(tmp_path / "kv", FINGERPRINT, executor.block_bytes, 1 << 30)
        stack = Stack(executor, chunk=512, blocks=FEW, disk=disk)
        if life == 0:
            ask_each(stack, some, times=2)
            check(stack.answers, expected)
        before = stack.cache.hit_tokens[Tier.DISK]
        ask_each(stack, some)
        check(stack.answers, expected)
        assert stack.cache.hit_tokens[Tier.DISK] - before > most_tokens(some)
        stack.close()
        disk.close()
        executor = NativeExecutor(default_program, threads=1, blocks=FEW, max_tokens=512, max_rows=64)
    executor.close()


def test_hits_on_disk_through_the_host(
    native_executor, some: Prompts, expected: dict[str, Answer], tmp_path: Path
) -> None:
    """Device and host too small, all prompts at once, three times."""
    disk = DiskStore.open(tmp_path / "kv", FINGERPRINT, native_executor.block_bytes, 1 << 27)
    stack = Stack(native_executor, chunk=64, blocks=FEW, host_blocks=FEW, disk=disk)
    for _ in range(3):
        for name, (tokens, sampling) in some.items():
            stack.submit(name, tokens, sampling)
        check(stack.run(), expected)
    assert stack.cache.hit_tokens[Tier.HOST] + stack.cache.hit_tokens[Tier.DISK] > 0
    stack.close()
    disk.close()


def test_preemption_with_a_swap(native_executor, some: Prompts, expected: dict[str, Answer]) -> None:
    stack = Stack(native_executor, chunk=128, blocks=FEW, host_blocks=1024)
    stack.expect_short_answers(60)
    for name, (tokens, sampling) in some.items():
        stack.submit(name, tokens, sampling)
    check(stack.run(), expected)
    status = stack.scheduler.status()
    assert status.preemptions > 0 and stack.cache.moves.traffic[Tier.HOST, Tier.DEVICE].moves > 0
    stack.close()


def test_int8_kv(default_program: Program, some: Prompts, expected: dict[str, Answer]) -> None:
    """The same with keys and values in int8: alone, together, and from the host."""
    executor = NativeExecutor(
        default_program, threads=2, blocks=256, max_tokens=512, max_rows=512, kv_format="int8"
    )
    few = dict(list(some.items())[:8])
    alone: dict[str, Answer] = {}
    for name, (tokens, sampling) in few.items():
        stack = Stack(executor, chunk=512, reuse=False)
        stack.submit(name, tokens, sampling)
        alone |= stack.run()
        stack.close()
    assert alone != {name: expected[name] for name in few}  # it is not bfloat16
    stack = Stack(executor, chunk=64, blocks=FEW, host_blocks=512)
    for name, (tokens, sampling) in few.items():
        stack.submit(name, tokens, sampling)
    check(stack.run(), alone)
    ask_each(stack, few)
    check(stack.answers, alone)
    assert stack.cache.hit_tokens[Tier.HOST] > 0
    stack.close()
    executor.close()
