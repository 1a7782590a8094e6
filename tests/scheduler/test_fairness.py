"""The bounds of the balance scheduler, in simulated runs of the production classes.

F1 to F24 are the properties of the specification. A bound is asserted as it is written there; what its
derivation leaves out is said where it matters. Each of the ten mistakes of other schedulers is put into a
mutated class, on which the property that it breaks has to fail.
"""

import itertools
import json
import os
import random
import time
from collections import Counter
from dataclasses import replace

import pytest
import request_maker
from measured import SMALL, Measured, closed, units

from ktransformers.scheduler import engine_life
from ktransformers.scheduler import entrance as entrance_module
from ktransformers.scheduler import scheduler as scheduler_module
from ktransformers.scheduler.charges import UNIT, Prices
from ktransformers.scheduler.entrance import Entrance
from ktransformers.scheduler.fair_queue import FairQueue, Rules
from ktransformers.scheduler.protocol import Cancel
from ktransformers.scheduler.simulator import Machine, Simulation, percentile
from ktransformers.scheduler.workload import Arrival, Load, WorkloadError, generate, read_trace

SEEDS = range(int(os.environ.get("FAIRNESS_SEEDS", "2")))
"""20 in `make nightly`."""
NIGHTLY = "FAIRNESS_SEEDS" in os.environ
SECONDS = float(os.environ.get("FAIRNESS_SECONDS", "60"))
"""Simulated, about 16 steps each; 6,250 in `make nightly`, which is 10^5 steps."""

LOADS = {
    "alike": [closed(name) for name in "abcd"],
    "mixed": [
        closed("a", prompt=50, output=300),
        closed("b", prompt=600, output=20),
        closed("c", prompt=200, output=100),
    ],
    "weights": [closed("a"), closed("b", weight=2.0), closed("c", weight=4.0)],
    "long and short": [closed("a", prompt=30, output=700), closed("b", prompt=30, output=30)],
}


def weights(loads):
    return {load.name: load.weight for load in loads}


class Predicts(FairQueue):
    """A predictor that is wrong."""

    how = staticmethod(lambda right, n: right)

    def predicted(self, account):
        self.asked = getattr(self, "asked", 0) + 1
        return max(1, int(self.how(super().predicted(account), self.asked)))


def predictor(how):
    return type("Wrong", (Predicts,), {"how": staticmethod(how)})


PREDICTORS = {
    "as it is": lambda right, n: right,
    "a tenth": lambda right, n: right / 10,
    "ten times": lambda right, n: right * 10,
    "nothing": lambda right, n: 0,
    "adversarial": lambda right, n: (1, 4096)[n % 2],
}


# ---- F1, F2, F12: service gaps


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("load", LOADS)
def test_f1_service_gap_without_prediction(load, seed, monkeypatch, record_property):
    m = run_without_prediction(LOADS[load], seed, monkeypatch)
    bound = 2 * (m.u(weights(LOADS[load])) + m.windows())
    record_property("gap", units(m.gap))
    assert m.gap <= bound, f"{units(m.gap):.0f} > {units(bound):.0f} units"


@pytest.mark.parametrize("seed", SEEDS)
def test_f1_what_runs_bounds_the_gap_not_what_fits(seed, monkeypatch):
    """Long outputs: as requests end, those that stay grow into their room, so more than U may be charged
    after the last admission. What was left of all that ran is the bound; U times a harmonic number bounds it.
    """
    m = run_without_prediction(HOARD, seed, monkeypatch, 200.0)
    assert m.gap <= 2 * (m.left_at_admission + m.windows())
    harmonic = sum(1 / n for n in range(1, m.machine.slots + 1))
    assert m.left_at_admission <= m.u(weights(HOARD), cap=False) * harmonic


def run_without_prediction(loads, seed, monkeypatch, seconds=SECONDS):
    monkeypatch.setattr(scheduler_module, "FairQueue", unpredicting(FairQueue))
    m = Measured(loads, seed=seed, settings={"fair_preempt": 0.0})
    m.run(seconds)
    return m


def unpredicting(queue):
    class Unpredicting(queue):
        def __init__(self, rules):
            super().__init__(replace(rules, predict=False))

    return Unpredicting


@pytest.mark.parametrize("how", PREDICTORS)
@pytest.mark.parametrize("load", LOADS)
def test_f1_f12_service_gap_with_any_predictor(load, how, monkeypatch):
    monkeypatch.setattr(scheduler_module, "FairQueue", predictor(PREDICTORS[how]))
    for seed in SEEDS if NIGHTLY else [0]:
        m = Measured(LOADS[load], seed=seed, settings={"fair_preempt": 0.0})
        m.run(SECONDS)
        bound = 2 * (2 * m.u(weights(LOADS[load])) + m.windows())
        assert m.gap <= bound, f"{units(m.gap):.0f} > {units(bound):.0f} units"


TIGHT = {"fair_window": 0.2, "fair_preempt": 1.0}
HOARD = [closed("a", prompt=30, output=900, count=40), closed("b", prompt=200, output=20, count=8)]


def check_preemption_bound(monkeypatch):
    """Of F2: a tenant with long outputs gets far ahead unless it has to make room.

    As derived the bound is one of executed service only without prediction, and only while the guard on what
    is computed again does not stop the preemption: it is taken away here. No request is exempt from it.
    """
    monkeypatch.setattr(entrance_module, "_RECOMPUTED_SHARE", 1.0)
    monkeypatch.setattr(scheduler_module, "FairQueue", unpredicting(FairQueue))
    for seed, urgent_tokens in itertools.product(SEEDS, (0, 256)):
        machine = replace(SMALL, urgent_tokens=urgent_tokens)
        m = Measured(HOARD, seed=seed, settings=TIGHT, machine=machine)
        m.run(max(SECONDS, 200.0))
        bound = 2 * (m.theta() + m.largest_step + m.windows())
        assert m.gap <= bound, f"{units(m.gap):.0f} > {units(bound):.0f} units"


def test_f2_service_gap_with_preemption(monkeypatch):
    check_preemption_bound(monkeypatch)


def test_f2_one_victim_is_not_always_enough(monkeypatch):
    """Nor does a promise that could not be kept stop the next one. Both did, and the gap grew to U."""

    class OneAtMost(Entrance):
        def _enough(self, movable, entry, running):
            return super()._enough(movable, entry, running)[:1] if self._promised is None else []

    monkeypatch.setattr(engine_life, "Entrance", OneAtMost)
    with pytest.raises(AssertionError, match="units"):
        check_preemption_bound(monkeypatch)


# ---- F3, F4: shares


@pytest.mark.parametrize("seed", SEEDS)
def test_f3_shares_by_weight(seed):
    loads = [closed("a", count=30), closed("b", weight=2.0, count=40), closed("c", weight=4.0, count=60)]
    m = Measured(loads, seed=seed)
    # U without the limit on KV: it does not bind the tenant that is owed most.
    window = 20 * m.u(weights(loads), cap=False)
    before = dict(m.work)
    windows = 0
    while windows < 2:
        m.move()
        done = {name: m.work[name] - before.get(name, 0) for name in "abc"}
        if sum(done.values()) < window:
            continue
        windows += 1
        before = dict(m.work)
        for load in loads:
            due = load.weight / 7
            assert abs(done[load.name] / sum(done.values()) - due) <= 0.05 * due, (load.name, done)


def furthest_from_due():
    """Of eight tenants whose prompts all begin with the same few tokens, in half a minute."""
    tenants = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    loads = [
        closed(f"t{i}", count=4 + round(5 * weight), prompt=70, output=24, prefix=30, weight=weight)
        for i, weight in enumerate(tenants)
    ]
    machine = Machine(prompt=0.00025, decode=0.0007)
    m = Simulation(generate(loads, 50.0, 1), "fair", machine, 1)
    m.run(10.0)
    before = {name: tenant.service for name, tenant in m.tenants.items()}
    m.run(40.0)
    done = {name: tenant.service - before[name] for name, tenant in m.tenants.items()}
    dues = {f"t{i}": weight / sum(tenants) for i, weight in enumerate(tenants)}
    return max(abs(done[name] / sum(done.values()) / due - 1) for name, due in dues.items())


def test_f3_a_short_common_beginning_moves_no_shares(monkeypatch):
    """Whoever is within the window may go first for a cached prefix: for a real one. The window is of
    seconds of the whole engine, so to a tenant of small weight it is half a minute of its share."""
    assert furthest_from_due() <= 0.05
    monkeypatch.setattr(entrance_module, "_LEAST_HIT", 0)
    assert furthest_from_due() > 0.2


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32, 64] if NIGHTLY else [2, 8, 64])
def test_f4_jain(n):
    rng = random.Random(n)
    loads = [
        closed(
            f"t{i}",
            count=max(8, 96 // n),
            prompt=rng.choice([50, 200]),
            output=rng.choice([20, 60]),
            weight=1.0 + i % 3,
        )
        for i in range(n)
    ]
    m = Measured(loads, seed=n, settings={"tbt_slo": 0.0}, machine=replace(SMALL, noise=0.0))
    m._look = lambda: None
    u = m.u(weights(loads))
    for times, least in ((20, 0.95), (100, 0.99))[: 2 if NIGHTLY else 1]:
        while min(m.work[x.name] / x.weight for x in loads) < times * u:
            assert m.move()
        by_weight = [m.work[x.name] / x.weight for x in loads]
        jain = sum(by_weight) ** 2 / (n * sum(w * w for w in by_weight))
        assert jain >= least, (n, jain)


@pytest.mark.parametrize("n", [2, 8])
def test_f4_jain_in_the_long_run(n):
    """0.99 after 100 U each; on a quarter of the KV, so that U is soon done."""
    machine = replace(SMALL, noise=0.0, blocks=64, slots=8, max_len=256)
    loads = [closed(f"t{i}", count=12, prompt=60, output=15 + i, weight=1.0 + i % 3) for i in range(n)]
    m = Measured(loads, seed=n, settings={"tbt_slo": 0.0}, machine=machine)
    m._look = lambda: None
    u = m.u(weights(loads))
    while min(m.work[x.name] / x.weight for x in loads) < 100 * u:
        assert m.move()
    by_weight = [m.work[x.name] / x.weight for x in loads]
    assert sum(by_weight) ** 2 / (n * sum(w * w for w in by_weight)) >= 0.99


# ---- F5, F6, F7, F8: work, waiting, credit, debt


def brute_peak(shared, runs, size):
    """The most blocks that are held at once, the slow way."""
    by_end = sorted(runs, key=lambda run: run[1])
    held = sum(own for own, _ in by_end)
    peak = held
    for alive, (own, left) in zip(range(len(by_end), 0, -1), by_end, strict=True):
        peak = max(peak, held + alive * -(-left // size))
        held -= own
    return shared + peak


def check_work_conservation(seed, seconds=60.0):
    """After no plan is there a free slot and budget while the neediest request fits; and small requests pass
    one that does not fit."""
    loads = [
        Load(name="big", kind="closed", count=6, prompt=800, output=200, fixed=True),
        Load(name="small", kind="closed", count=30, prompt=20, output=10),
        Load(name="now and then", rate=0.5, prompt=100, output=50),
    ]
    m = Measured(loads, seed=seed, settings={"tbt_slo": 0.0}, seconds=seconds)
    planner, cache = m.scheduler._engine.planner, m.scheduler._engine.cache
    idle, most = [], Counter()
    plan = planner.plan

    def watched(now):
        preemptions = m.scheduler.counters.preemptions
        planned = plan(now)
        used = planned.tokens if planned is not None else 0
        if used < m.machine.max_batch_tokens and m.scheduler.counters.preemptions == preemptions:
            look(now)
        return planned

    def look(now):
        for account in m.queue._tenants.members.values():
            most[account.name] = max(most[account.name], len(account.running))
        estimate, size = m.scheduler._estimate, cache.block_tokens
        least = m.queue.least()
        if least is None or len(planner.running) >= m.machine.slots or least.head().in_flight:
            return
        if planner._paused:
            return  # a short step without the streams, for those that ask seldom
        head = least.head()
        found = cache.match(head.table, head.tokens)
        runs, alone = [], 0
        for r in planner.running:
            own = len(r.table.blocks) - r.table.hits
            alone += own
            runs.append((own + cache.missing(r.table, r.total), estimate.left(r)))
        runs.append((-(-len(head.tokens) // size) - len(found), estimate.left(head)))
        peak = brute_peak(cache.used - alone + cache.idle(found), runs, size)
        # What is kept for those that are about: what they have had at once, and one request more.
        for account in m.queue._tenants.members.values():
            assert account.kept[0] <= most[account.name] + 1
        slots, tokens = m.queue.kept
        kept = len(planner.running) >= m.machine.slots - slots or peak > cache.total - -(-tokens // size)
        assert peak > cache.total or kept, "the neediest fits and is not let in"
        idle.append(head.id)

    planner.plan = watched
    m.run(seconds)
    assert m.tenants["small"].done > 200, m.tenants["small"].done
    # The large one got its share all the same.
    assert m.work["big"] / m.work["small"] > 0.85


@pytest.mark.parametrize("seed", SEEDS)
def test_f5_work_conservation(seed):
    check_work_conservation(seed)


def dispatch_bound(m, names, mine):
    """Seconds after which a request of `mine` that arrives without debt is let in, at the latest."""
    u = units(m.u(dict.fromkeys(names, 1.0), cap=False))
    a = units(m.rate)
    return sum(u + units(m.windows()) for name in names if name != mine) / a


@pytest.mark.parametrize("seed", SEEDS)
def test_f6_f17_a_light_tenant_waits_no_longer_than_the_bound_and_is_never_refused(seed):
    """Even when the queue is full of another's requests."""
    loads = [
        Load(name="flood", rate=20.0, prompt=300, output=200),
        Load(name="light", rate=0.3, prompt=50, output=20, fixed=True),
    ]
    m = Measured(loads, seed=seed, seconds=150.0, settings={"max_waiting": 50})
    m.run(150.0)
    light, flood = m.tenants["light"], m.tenants["flood"]
    assert light.refused == 0 and light.done > 20
    assert flood.refused > 1000
    waits = [r.queue_seconds for r in m.charged_requests.values() if r.tenant.id == "light"]
    assert percentile(waits, 0.99) <= dispatch_bound(m, ["flood", "light"], "light")


@pytest.mark.parametrize("seed", SEEDS)
def test_f6_nothing_starves(seed):
    """All that was let into the queue of an overloaded server is dispatched in the end."""
    rng = random.Random(seed)
    loads = [
        Load(
            name=f"t{i}",
            kind="flood",
            count=12,
            weight=rng.choice([0.25, 1.0, 4.0]),
            prompt=rng.choice([20, 300, 900]),
            output=rng.choice([10, 100]),
            fixed=True,
        )
        for i in range(8)
    ]
    m = Measured(loads, seed=seed)
    m.run(100_000.0)
    assert {t.done for t in m.tenants.values()} == {12}
    assert m.scheduler.status().blocks_used == 0


def served_after_idling(idle):
    """Service of a tenant that comes back after so many seconds, in its first 20."""
    first = [Arrival(0.0, "back", 100, 50) for _ in range(4)]
    again = [Arrival(50.0 + idle, "back", 100, 50, again=True) for _ in range(30)]
    m = Measured([], arrivals=iter([Arrival(0.0, "busy", 200, 100, again=True)] * 30 + first + again))
    m._look = lambda: None
    while m.now < 50.0:
        m.move()
    # The clock alone moves on: no work is done meanwhile, whatever its length.
    m.now += idle
    m._done_at += idle
    m._ticked += idle
    m.scheduler._fronts.heard(b"simulator", m.now)
    m.scheduler._ticked_at = m.now
    before, until = m.work["back"], m.now + 20.0
    while m.now < until:
        m.move()
    return (m.work["back"] - before) / UNIT


def test_f7_idling_earns_nothing():
    served = [served_after_idling(idle) for idle in (1.0, 3600.0, 864_000.0)]
    one_request = 100 + 2 * 50
    assert max(served) - min(served) <= one_request, served


def check_no_credit():
    """A tenant that was away while others were served is not owed what it did not ask for."""
    arrivals = [Arrival(0.0, "busy", 200, 100, again=True)] * 30 + [Arrival(1.0, "back", 100, 10)] * 2
    m = Measured([], arrivals=iter(arrivals + [Arrival(9.0, "back", 100, 50, again=True)] * 30))
    while m.now < 9.0:
        m.move()
    before = dict(m.work)
    while m.now < 15.0:
        m.move()
    share = (m.work["back"] - before["back"]) / (sum(m.work.values()) - sum(before.values()))
    assert share <= 0.6, f"it gets {share:.0%} where half is due"


def test_f7_mistake_1_no_lift_for_the_one_who_returns(monkeypatch):
    check_no_credit()

    class NoLift(scheduler_module.FairQueue):
        def __init__(self, rules):
            super().__init__(rules)
            self._tenants.lift = self._tenants._idle.drop

    monkeypatch.setattr(scheduler_module, "FairQueue", NoLift)
    with pytest.raises(AssertionError, match="where half is due"):
        check_no_credit()


def test_mistake_2_head_of_line_block(monkeypatch):
    class Breaks(Entrance):
        def _ahead_of(self, first, running):
            return None

    monkeypatch.setattr(engine_life, "Entrance", Breaks)
    with pytest.raises(AssertionError):
        check_small_ones_pass()


def check_small_ones_pass():
    """While the neediest tenant's large request waits for room a small one of another goes ahead."""
    arrivals = [
        Arrival(0.0, "runs", 500, 400),
        Arrival(0.0, "small", 60, 20),
        Arrival(1.2, "needy", 700, 100),
        Arrival(1.5, "small", 20, 5),
    ]
    m = Measured([], machine=replace(SMALL, blocks=64, slots=8), arrivals=iter(arrivals))
    m.run(60.0)
    waits = {r.id: r.queue_seconds for r in m.charged_requests.values()}
    assert waits["r4"] < 0.5, waits
    assert waits["r3"] > 1.0, "nothing had to wait: the test shows nothing"


def test_small_ones_pass_one_that_does_not_fit():
    check_small_ones_pass()


def check_no_laundering(how):
    """F8: whoever goes away in debt and comes back, by whatever means, has it still."""
    arrivals = [Arrival(0.0, "honest", 200, 100, again=True)] * 20
    arrivals += [Arrival(0.0, "cheat", 200, 100, again=True, user="key0")] * 20
    m = Measured([], arrivals=iter(arrivals), settings={"fair_preempt": 0.0})
    rng = random.Random(1)
    n, gains = 0, []
    while m.now < 100.0:
        m.move()
        if m.now >= 50.0:
            gains.append((m.work["cheat"] - m.work["honest"]) / UNIT)
        # When it is in debt it drops all that it has, and is back at once under another key.
        account = m.queue._tenants.members.get("cheat")
        in_debt = account is not None and account.counter > m.queue._tenants.time + 100 * UNIT
        if in_debt and rng.random() < 0.1:
            n += 1
            mine = [i for i, o in m._open.items() if o.arrival.tenant == "cheat"]
            how(m, mine, n)
    # At a moment one may be ahead by what F1 allows; on the average by no more than one request.
    gain = sum(gains) / len(gains)
    assert gain <= 400, f"it gained {gain:.0f} units"


def cancel_and_return(m, mine, n):
    arrivals = [m._open[request_id].arrival for request_id in mine]
    for request_id, arrival in zip(mine, arrivals, strict=True):
        m._open[request_id].arrival = replace(arrival, again=False)
        m.scheduler.front(b"simulator", Cancel(request_id), m.now)
    m.scheduler.advance(m.now)
    for arrival in arrivals:
        m._submit(replace(arrival, user=f"key{n}"))


class Forgets(FairQueue):
    """Debts go with the last request."""

    def _close(self, request, account, user):
        super()._close(request, account, user)
        if account in self._lingering:
            self._part(account)
            self._tenants._idle.drop(account)
            self._tenants.members.pop(account.name, None)


def test_f8_no_laundering(monkeypatch):
    """Without prediction: with it V* is beyond what was executed, and who lets go of what runs falls back."""
    check_no_laundering(cancel_and_return)
    monkeypatch.setattr(scheduler_module, "FairQueue", unpredicting(FairQueue))
    check_no_laundering(cancel_and_return)
    monkeypatch.setattr(scheduler_module, "FairQueue", unpredicting(Forgets))
    with pytest.raises(AssertionError, match="gained"):
        check_no_laundering(cancel_and_return)


def test_mistake_4_debt_is_forgotten_with_the_record():
    assert debt_after_return(FairQueue) == 990 * UNIT
    assert debt_after_return(Forgets) == 0


def debt_after_return(queue_class):
    """How far a tenant's counter is beyond V* when it comes back; it was served ahead of one that waits."""
    queue = queue_class(Rules())
    waits, runs, again = (
        request_maker.request(i, name) for i, name in enumerate(["honest", "cheat", "cheat"])
    )
    queue.push(waits)
    queue.charge(waits, 10 * UNIT)
    queue.push(runs)
    queue.enter(runs, 0)
    queue.charge(runs, 1000 * UNIT)
    queue.leave(runs)
    queue.step(0.0)
    queue.step(3600.0)
    queue.push(again)
    return queue._tenants.members["cheat"].counter - queue._tenants.time


# ---- F9, F19: numbers and clocks


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


# ---- F10, F11: charges


@pytest.mark.parametrize("seed", SEEDS)
def test_f10_charges_are_what_was_computed(seed):
    """Exactly, with hits, preemptions and cancellations: each token once, at its price."""
    loads = [
        closed("a", count=20, prompt=200, output=300, prefix=100, topics=3),
        closed("b", count=20, prompt=100, output=200, weight=3.0),
    ]
    m = Measured(loads, seed=seed, machine=replace(SMALL, blocks=100))
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
    m.scheduler._rules = replace(m.scheduler._rules, prices=prices)
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


# ---- mistakes 6 to 9


def test_mistake_6_fair_only_at_admission(monkeypatch):
    class Never(Entrance):
        def victims(self, running):
            return []

    monkeypatch.setattr(engine_life, "Entrance", Never)
    with pytest.raises(AssertionError, match="units"):
        check_preemption_bound(monkeypatch)


def check_every_choice_is_charged():
    """A tenant that asks for n = 4 at once gets no more than one that asks four times."""
    m = Measured([closed("four", count=24), closed("one", count=24)])
    m.run(100.0)
    assert 0.9 < m.work["four"] / m.work["one"] < 1.1


def test_mistake_7_choices_are_not_charged(monkeypatch):
    check_every_choice_is_charged()

    class FirstOnly(FairQueue):
        def charge(self, request, cost):
            siblings = request.tenant.id == "four" and request.order % 4
            super().charge(request, 0 if siblings else cost)

    monkeypatch.setattr(scheduler_module, "FairQueue", FirstOnly)
    with pytest.raises(AssertionError):
        check_every_choice_is_charged()


def check_names_earn_nothing():
    """A tenant gets its share, however many users it says it has."""
    m = Measured([closed("plain"), closed("sybil", users=10)])
    m.run(100.0)
    assert 0.9 < m.work["sybil"] / m.work["plain"] < 1.1


def test_mistake_8_the_clients_name_is_its_identity():
    check_names_earn_nothing()

    # A front end that takes the client's word for who it is.
    m = Measured([closed("plain"), *(closed(f"sybil{i}", count=3) for i in range(10))])
    m.run(100.0)
    sybils = sum(done for name, done in m.work.items() if name.startswith("sybil"))
    assert sybils / m.work["plain"] > 3


def looks_at(queue_class, monkeypatch, tenants, each):
    """Keys that are computed for a step, with so many tenants waiting."""
    looks = []

    class Counts(queue_class):
        def _key(self, claimant):
            looks.append(1)
            return super()._key(claimant)

    monkeypatch.setattr(scheduler_module, "FairQueue", Counts)
    loads = [Load(name=f"t{i}", kind="flood", count=each, prompt=30, output=20) for i in range(tenants)]
    m = Simulation(arrivals_of(loads), "fair", SMALL)
    m.run(3.0)
    looks.clear()
    before = m.scheduler.counters.steps
    m.run(8.0)
    return len(looks) / (m.scheduler.counters.steps - before)


def arrivals_of(loads):
    return generate(loads, 1e9, 0)


def test_mistake_9_the_whole_queue_is_sorted_each_step(monkeypatch):
    few, many = (looks_at(FairQueue, monkeypatch, n, 2000 // n) for n in (50, 1000))
    assert many <= 2 * few + 10

    class Sorts(FairQueue):
        def step(self, now):
            sorted(self._with_waiting, key=self._key)
            super().step(now)

    few, many = (looks_at(Sorts, monkeypatch, n, 2000 // n) for n in (50, 1000))
    assert many > 2 * few + 10


def check_what_never_fits(monkeypatch):
    """F22: it is refused at once, and those behind it are served."""
    m = Measured([], arrivals=iter([Arrival(0.0, "a", 5000, 10), Arrival(0.1, "a", 50, 10)]))
    while m.now < 0.1 and m.move():
        pass
    assert "r1" not in m._open, "it waits, for ever"
    m.run(30.0)
    assert m.tenants["a"].refused == 1 and m.tenants["a"].done == 1, "one behind it is not served"


def test_f22_mistake_10_what_never_fits_waits_for_ever(monkeypatch):
    check_what_never_fits(monkeypatch)
    monkeypatch.setattr(scheduler_module, "check", lambda submit, limits: submit.sampling)
    with pytest.raises(AssertionError, match="for ever"):
        check_what_never_fits(monkeypatch)


# ---- F23: the time between tokens; and how long one that asks seldom waits


def steps_with_streams(loads, seconds=60.0, **settings):
    """Seconds of all steps in which a stream got a token while a prompt was computed."""
    m = Measured(loads, settings=settings)
    m._look = lambda: None
    times = []
    step = m._engine.step

    def timed(what):
        done = step(what)
        chunks = sum(go.n_tokens > 1 for go in what.go_on)
        if 0 < chunks < len(what.go_on):
            times.append(done.seconds)
        return done

    m._engine.step = timed
    m.run(seconds)
    return times


@pytest.mark.parametrize("load", LOADS)
def test_f23_steps_keep_to_the_slo(load):
    slo = 0.1
    times = steps_with_streams(LOADS[load], tbt_slo=slo)
    assert len(times) > 100
    late = sum(seconds > 1.25 * slo for seconds in times[50:]) / len(times[50:])
    assert late <= 0.01, f"{late:.1%} are late"
    # Nor does it take an engine of which nothing is known for a fast one.
    assert max(times[:50]) <= 2 * slo, max(times[:50])


def test_f23_without_a_limit_steps_are_long():
    times = steps_with_streams(LOADS["mixed"], tbt_slo=0.0)
    assert sum(seconds > 0.125 for seconds in times) > 0.1 * len(times)


MEASURED = Machine(
    slots=64, blocks=4096, max_len=8192, step=0.0022, prompt=0.00025, decode=0.00042, context=3.7e-7
)
"""The default model on two cores of 2025."""


def first_tokens(policy, flood=True, machine=MEASURED):
    """Of a tenant that asks once a second, beside one that floods: 95 % are sooner; and all service."""
    arrivals = [Arrival(5.0 + i * 1.01, "seldom", 50, 20) for i in range(60)]
    if flood:
        count = machine.slots * 3 // 2
        arrivals += [Arrival(0.0, "flood", 300, 100, again=True) for _ in range(count)]
    arrivals.sort(key=lambda arrival: arrival.seconds)
    m = Simulation(iter(arrivals), policy, machine)
    result = m.run(70.0)
    seldom = result.tenants["seldom"]
    assert len(seldom.ttft) >= (58 if policy == "fair" else 1)
    return percentile(seldom.ttft, 0.95), sum(t.service for t in result.tenants.values())


def test_a_noisy_neighbour_is_hardly_noticed(monkeypatch):
    alone, _ = first_tokens("fair", flood=False)
    beside, service = first_tokens("fair")
    behind, whole = first_tokens("fifo")
    assert beside <= 1.2 * alone, (alone, beside)
    assert behind > 50 * alone
    assert service >= 0.97 * whole

    # Virtual counters and all the rest, but steps as long as streams bear, and nobody first.
    plain = scheduler_module.Rules.of
    monkeypatch.setattr(
        scheduler_module.Rules, "of", lambda config: replace(plain(config), fresh_first=False)
    )
    without, _ = first_tokens("fair")
    assert without > 5 * alone, (alone, without)


def test_a_noisy_neighbour_where_steps_are_not_interrupted():
    machine = Machine(urgent_tokens=0)
    alone, _ = first_tokens("fair", flood=False, machine=machine)
    beside, service = first_tokens("fair", machine=machine)
    _, whole = first_tokens("fifo", machine=machine)
    assert beside <= 2.5 * alone, (alone, beside)
    assert service >= 0.92 * whole


def put_off(arrivals, urgent_tokens=0):
    """How often a plan was put off, and the part of the time that the engine was in a step."""
    m = Simulation(iter(arrivals), "fair", Machine(urgent_tokens=urgent_tokens))
    count, busy = 0, 0.0
    step = m._engine.step

    def timed(what):
        nonlocal busy
        done = step(what)
        busy += done.seconds
        return done

    m._engine.step = timed
    while m.now < 40.0 and m.move(40.0):
        count += m.scheduler.wake_at(m.now) is not None
    return count, busy / m.now


def test_the_next_step_is_planned_late_only_for_somebodys_sake():
    flood = [Arrival(0.0, "flood", 300, 100, again=True) for _ in range(40)]
    seldom = [Arrival(5.0 + i, "seldom", 50, 20) for i in range(35)]
    assert put_off(flood)[0] == 0
    count, busy = put_off(flood + seldom)
    assert count > 100
    # Times are predicted to 5 %, as they vary: hardly a step is done before the next one is planned.
    assert busy > 0.98, busy
    count, busy = put_off(flood + seldom, urgent_tokens=256)
    assert count == 0 and busy > 0.99


# ---- F13 to F16


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


# ---- F20, F21, F24


@pytest.mark.parametrize("which", ["tenants", "users"])
def test_f20_mistake_3_what_is_kept_of_a_million_keys(which, monkeypatch):
    count = 1_000_000 if NIGHTLY else 60_000
    queue = many_keys(FairQueue, which, count)
    assert len(queue._tenants.members) <= 20_000
    assert sum(len(a.users.members) for a in queue._tenants.members.values()) <= 40_000

    class Keeps(FairQueue):
        def __init__(self, rules):
            super().__init__(rules)
            self._tenants._collect = lambda: None

    if which == "tenants":
        assert len(many_keys(Keeps, which, 30_000)._tenants.members) == 30_000


def many_keys(queue_class, which, count):
    """One request each, with the clock standing still: nothing is ever waiting when the next one comes."""
    queue = queue_class(Rules())
    for i in range(count):
        tenant = (f"t{i}", "") if which == "tenants" else ("t", f"u{i}")
        request = request_maker.request(i, *tenant)
        queue.push(request)
        queue.enter(request, 0)
        queue.charge(request, 10 * UNIT)
        queue.leave(request)
        queue.step(0.0)
    return queue


def test_f20_memory():
    import tracemalloc

    tracemalloc.start()
    queue = many_keys(FairQueue, "tenants", 40_000)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(queue._tenants.members) > 1000
    assert size < 64 << 20, size


@pytest.mark.parametrize(("waiting", "tenants", "limit"), [(1000, 100, 1.0), (10_000, 1000, 5.0)])
def test_f21_decision_time(waiting, tenants, limit, capsys):
    machine = Machine(blocks=4096, slots=64, max_batch_tokens=512)
    loads = [
        Load(name=f"t{i}", kind="closed", count=waiting // tenants, prompt=300, output=100)
        for i in range(tenants)
    ]
    sim = Simulation(arrivals_of(loads), "fair", machine)
    times = []
    engine = sim.scheduler.engine

    def timed(message, now):
        begin = time.thread_time()
        engine(message, now)
        sim.scheduler.advance(now)
        times.append(time.thread_time() - begin)

    while len(times) < 1000:
        if len(times) == 0 and sim.now > 0:
            sim.scheduler.engine = timed
        sim.move()
    # The best of four stretches. The bound is for a quiet machine; where others run beside the test only a
    # gross failure is one.
    stretches = [sorted(times[first : first + 200]) for first in range(200, 1000, 200)]
    median, p99 = min(s[100] for s in stretches) * 1e3, min(s[198] for s in stretches) * 1e3
    with capsys.disabled():
        print(f"\n  {waiting} waiting, {tenants} tenants: median {median:.2f} ms, p99 {p99:.2f} ms")
    assert p99 < 5 * limit


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


def test_trace_files(tmp_path):
    file = tmp_path / "trace.jsonl"
    size = {"prompt": 5, "output": 3}
    lines = [{"seconds": 2.0, "tenant": "b", **size}, {"seconds": 1, "tenant": "a", **size}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    assert [a.tenant for a in read_trace(file)] == ["a", "b"]
    file.write_text('{"seconds": 1, "what": 2}')
    with pytest.raises(WorkloadError, match="what"):
        read_trace(file)


def test_service_against_what_was_due():
    """Of tenants with a backlog it is what their weights say; a light one is due nothing that it did not ask
    for."""
    loads = [closed("a"), closed("b", weight=3.0), Load(name="light", rate=1.0, prompt=50, output=10)]
    status = Measured(loads, seed=1).run(100.0).status
    by_name = {tenant.id: tenant for tenant in status.tenants}
    for name in "ab":
        assert abs(by_name[name].backlogged_service / by_name[name].due - 1) < 0.05, by_name[name]
    assert by_name["light"].due < by_name["light"].service
