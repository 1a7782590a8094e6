"""F13, F16, F24: the blocks of the KV cache, what is computed again, and what is found."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from measured import LOADS, SEEDS, SMALL, TIGHT, Measured, closed

from ktransformers.scheduler import engine_life
from ktransformers.scheduler.entrance import Entrance
from ktransformers.scheduler.growth import Profile
from ktransformers.scheduler.protocol import Cancel
from ktransformers.scheduler.workload import Load


@pytest.mark.parametrize("seed", SEEDS)
def test_f13_f16_blocks_are_conserved_and_little_is_computed_again(seed):
    """Under an overload of long outputs, with a check of all blocks, slots and counts after every event."""
    loads = [
        closed("a", count=20, prompt=30, output=400),
        closed("b", count=20, prompt=300, output=100),
        Load(name="c", rate=1.0, prompt=100, output=50),
    ]
    m = Measured(loads, seed=seed, settings=TIGHT, machine=replace(SMALL, blocks=128))
    look = m._look

    def checked():
        look()
        m.scheduler.check()

    m._look = checked
    m.run(60.0)
    status = m.scheduler.status()
    assert max(r.preempted for r in m.charged_requests.values()) <= 3
    assert status.recomputed_tokens <= 0.25 * status.computed_tokens
    for request_id in list(m._open):
        m._open[request_id].arrival = replace(m._open[request_id].arrival, again=False)
        m.scheduler.front(b"simulator", Cancel(request_id), m.now)
    while m._steps or m._done is not None:
        m._next, m._returns = None, []
        m.move()
    assert m.scheduler.status().blocks_used == 0


@pytest.mark.parametrize("load", LOADS)
def test_goal_a_twentieth_is_computed_again_at_most(load):
    m = Measured(LOADS[load], seed=1)
    status = m.run(200.0).status
    assert status.recomputed_tokens <= 0.05 * status.computed_tokens


def shared_prefix(policy, **settings):
    """Tenants with a long common beginning each, more of them than the pool can keep."""
    loads = [closed(f"t{i}", count=12, prompt=560, output=20, prefix=512, fixed=True) for i in range(10)]
    sim = Measured(loads, policy, machine=replace(SMALL, slots=6), settings=settings, seed=2)
    result = sim.run(150.0)
    hits = result.status.prefix_hit_tokens / result.status.prefix_query_tokens
    shares = [sim.work[load.name] for load in loads]
    return hits, sum(shares) ** 2 / (len(shares) * sum(s * s for s in shares))


def test_f24_the_window_finds_prefixes(capsys):
    exact, _ = shared_prefix("vtc")
    windowed, jain = shared_prefix("fair")
    longest, _ = shared_prefix("fair", fair_window=86400.0)
    with capsys.disabled():
        print(
            f"\n  prefix hits: Q = 0 {exact:.0%}, Q = 2 s {windowed:.0%} (Jain {jain:.3f}), LPM {longest:.0%}"
        )
    assert windowed >= 0.9 * longest
    assert jain >= 0.95


_RUNS = st.tuples(st.integers(0, 40), st.integers(0, 500))


@given(st.integers(0, 100), st.lists(_RUNS, max_size=12), _RUNS, st.sampled_from([1, 4, 16]))
def test_nobody_takes_more_room_than_all_at_their_ends_together(shared, runs, entry, size):
    """So where that fits, it makes no difference who leaves when (`Entrance._has_room`)."""
    together = shared + sum(own + -(-left // size) for own, left in [*runs, entry])
    assert Profile(shared, runs, size).peak_with(*entry) <= together


@pytest.mark.parametrize("blocks", [64, 128, 4096])
def test_room_is_what_the_profile_says_it_is(blocks, monkeypatch):
    said = Counter()

    class Both(Entrance):
        def _has_room(self, entry, running, blocks):
            room = super()._has_room(entry, running, blocks)
            profile = self._profile_of(running)
            assert room == (profile.peak_with(entry.own, entry.left) + entry.idle <= blocks)
            said[room] += 1
            return room

    monkeypatch.setattr(engine_life, "Entrance", Both)
    loads = [
        closed("a", prompt=50, output=300, max_tokens=600),
        closed("b", prompt=300, output=20, prefix=200, topics=2),
        Load(name="c", rate=1.0, prompt=200, output=100),
    ]
    m = Measured(loads, machine=replace(SMALL, blocks=blocks), seconds=40.0)
    while m.now < 40.0 and m.move():
        m.scheduler.check()
    assert said[True] and (said[False] or blocks > 128)
