"""F1 to F24, but for those that are about one moment, over 20 seeds of 10^5 steps each."""

import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import long_run
import pytest

SEEDS, STEPS = 20, 100_000
CORES = len(os.sched_getaffinity(0))
NEEDED = (
    "backfills",
    "cancelled",
    "context_length_exceeded",
    "deadline",
    "down",
    "engine deaths",
    "engine_restarted",
    "hits",
    "never fit",
    "overloaded",
    "preemptions",
    "recomputed",
    "up",
    "urgent steps",
    "waits for room",
)
"""All of this has to happen, and to a seed at least once on the average: what does not occur is not shown to
be safe."""


def side_by_side(function, *arguments):
    """A process for each core: what `function` returns for each of the arguments."""
    with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, *arguments))


@pytest.mark.timeout(1800)
def test_every_bound_at_every_step(capsys):
    """Side by side, a process for each core. About 0.1 ms a step: two minutes on two cores."""
    begin = time.monotonic()
    seeds = side_by_side(long_run.run, range(SEEDS), [STEPS] * SEEDS)
    whole = sum(seeds, Counter())
    with capsys.disabled():
        print(f"\n  {SEEDS} x {STEPS} steps on {CORES} cores in {time.monotonic() - begin:.0f} s: ", end="")
        print(", ".join(f"{whole[what]} {what}" for what in NEEDED))
    assert not (seldom := [what for what in NEEDED if whole[what] < SEEDS]), seldom


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("load", long_run.LONG_OUTPUTS)
def test_goal_a_twentieth_of_long_outputs_is_computed_again_at_most(load, capsys):
    """Outputs of 800 tokens on average, whose beginning is the worst: nobody has ended yet."""
    shares = side_by_side(long_run.recomputed, [load] * SEEDS, range(SEEDS))
    with capsys.disabled():
        print(f"\n  {load}: {min(shares):.1%} to {max(shares):.1%} computed again", end="")
    assert max(shares) <= 0.05
