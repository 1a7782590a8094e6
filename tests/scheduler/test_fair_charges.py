"""F9 to F11, F18, F19: what is charged, exactly; and that nothing but what happens decides."""

import random
import time
from dataclasses import replace

import pytest
from measured import SEEDS, SMALL, Measured, closed

from ktransformers.scheduler.charges import UNIT, Prices
from ktransformers.scheduler.protocol import Cancel
from ktransformers.scheduler.workload import Arrival, Load


def trace(seed=0, shift=0, start=0.0, policy="fair"):
    loads = [closed("a", count=8, prompt=100, output=50), closed("b", count=8), Load(name="c", rate=0.5)]
    m = Measured(loads, policy, seed=seed, seconds=30.0)
    m.queue._tenants.time += shift
    return m.run(30.0).digest


def test_f9_counters_keep_their_order_beyond_2_to_the_53():
    assert trace() == trace(shift=1 << 53) == trace(shift=1 << 70)


def test_f18_the_same_seed_gives_the_same_bytes():
    for policy in ("fair", "vtc", "fifo"):
        assert trace(3, policy=policy) == trace(3, policy=policy) != trace(4, policy=policy)


def test_f19_the_wall_clock_is_not_looked_at(monkeypatch):
    before = trace()
    monkeypatch.setattr(time, "time", lambda: -86400.0)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    assert trace() == before


@pytest.mark.parametrize("seed", SEEDS)
def test_f10_charges_are_what_was_computed(seed):
    """Exactly, with hits, preemptions and cancellations: each token once, at its price."""
    loads = [
        closed("a", count=20, prompt=200, output=300, prefix=100, topics=3),
        closed("b", count=20, prompt=100, output=200, weight=3.0),
    ]
    m = Measured(loads, seed=seed, machine=replace(SMALL, blocks=100))
    m.scheduler._estimate.prior, m.scheduler._estimate.factor = 0.0, 1.0  # incautious: some have to make room
    rng = random.Random(seed)
    while m.now < 60.0:
        m.move()
        if rng.random() < 0.05 and m._open:
            m.scheduler.front(b"simulator", Cancel(rng.choice(sorted(m._open))), m.now)
    prices = Prices()
    status = m.scheduler.status()
    assert status.preemptions > 0 and status.prefix_hit_tokens > 0
    expected = 0
    for r in m.charged_requests.values():
        drawn = len(r.tokens) - r.n_prompt
        # A token that was drawn for a request that was cancelled meanwhile was computed all the same.
        drawn = max(drawn, (r.cost - prompt_cost(r, prices)) // prices.output)
        assert r.cost == prompt_cost(r, prices) + prices.output * drawn
        assert drawn <= len(r.tokens) - r.n_prompt + 2
        expected += max(r.cost, prices.floor)
    assert sum(m.work.values()) == expected
    assert sum(a.service for a in m.queue._tenants.members.values()) <= expected


def prompt_cost(request, prices):
    outputs = (len(request.tokens) - request.n_prompt) * prices.output
    rest = request.cost - outputs
    while rest >= prices.prompt * request.n_prompt + prices.output:
        rest -= prices.output
    return rest


def check_least_charge(prices):
    """F11: a request costs a unit at least, found in the cache or not."""
    m = Measured([], arrivals=iter([Arrival(float(i), "a", 65, 1, prefix=64) for i in range(20)]))
    m.scheduler._outcomes.prices = prices
    m.run(40.0)
    assert m.scheduler.status().prefix_hit_tokens >= 19 * 64
    for request in m.charged_requests.values():
        assert request.charged >= UNIT
    assert sum(m.work.values()) >= 20 * UNIT


def test_f11_mistake_5_a_hit_is_free():
    free = Prices(prompt=0, cached=0, output=0)
    check_least_charge(free)
    with pytest.raises(AssertionError):
        check_least_charge(replace(free, floor=0))
