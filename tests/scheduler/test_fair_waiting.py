"""F5, F6, F17, F22: who waits, how long, and that nobody waits while there is room."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import request_maker
from measured import SEEDS, SMALL, Measured, brute_peak, units

from ktransformers.scheduler import engine_life
from ktransformers.scheduler import scheduler as scheduler_module
from ktransformers.scheduler.entrance import Entrance
from ktransformers.scheduler.fair_queue import FairQueue
from ktransformers.scheduler.rules import Rules
from ktransformers.scheduler.simulator import percentile
from ktransformers.scheduler.workload import Arrival, Load


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
        # And, from eight slots on, one for whoever has none.
        slots = max(slots, 1)
        kept = len(planner.running) >= m.machine.slots - slots or peak > cache.total - -(-tokens // size)
        kept = kept and bool(least.running)
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


def test_f17_another_users_request_makes_room_where_the_first_ones_has_begun():
    queue = FairQueue(Rules())
    begun, waits = (request_maker.request(n, "flood", f"u{n}") for n in (1, 2))
    queue.push(begun)
    queue.enter(begun, 0)
    queue.leave(begun)
    begun.entered = True
    queue.push_front(begun)
    queue.push(waits)
    light = request_maker.request(3, "light").tenant
    assert queue.to_shed(light) is waits
    queue.remove(waits)
    queue.push(request_maker.request(4, "flood", "u1"))
    assert queue.to_shed(light).id == "r4"
    assert queue.to_shed(begun.tenant) is None


def test_f17_the_next_longest_makes_room_where_all_of_the_longest_has_begun():
    queue = FairQueue(Rules())
    begun = [request_maker.request(n, "flood") for n in (1, 2, 3)]
    for request in begun:
        queue.push(request)
        queue.enter(request, 0)
        queue.leave(request)
        request.entered = True
    for request in begun:
        queue.push_front(request)
    for n in (4, 5):
        queue.push(request_maker.request(n, "second"))
    assert queue.to_shed(request_maker.request(6, "light").tenant).id == "r5"
    assert queue.to_shed(request_maker.request(6, "second").tenant) is None


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
