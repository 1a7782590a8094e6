"""F23: the time between tokens; and how long one that asks seldom waits."""

import random
from dataclasses import replace

import pytest
from measured import LOADS, Measured

from ktransformers.scheduler import entrance as entrance_module
from ktransformers.scheduler import scheduler as scheduler_module
from ktransformers.scheduler.simulator import Machine, Simulation, percentile
from ktransformers.scheduler.step_time import Chunking, Features, StepTime
from ktransformers.scheduler.workload import Arrival


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


def comes_back(slots):
    """The longest wait for a first token of a tenant that is away for longer than it is expected back, while
    another floods; and all service by second."""
    machine = replace(MEASURED, slots=slots, blocks=64 * slots)
    rng, at, arrivals = random.Random(1), 5.0, []
    while at < 120.0:
        arrivals.append(Arrival(at, "back", 50, 20))
        at += rng.uniform(11.0, 20.0)
    arrivals += [Arrival(0.0, "flood", 300, 100, again=True) for _ in range(slots * 3 // 2)]
    m = Simulation(iter(sorted(arrivals, key=lambda arrival: arrival.seconds)), "fair", machine)
    result = m.run(120.0)
    assert len(result.tenants["back"].ttft) >= 6
    return max(result.tenants["back"].ttft), sum(t.service for t in result.tenants.values()) / m.now


@pytest.mark.parametrize("slots", [16, 64])
def test_a_slot_is_kept_for_newcomers(slots, monkeypatch):
    """It is no use for those that run, and costs them next to nothing."""
    wait, service = comes_back(slots)
    monkeypatch.setattr(entrance_module, "_NEWCOMERS_SLOT", slots + 1)
    without, whole = comes_back(slots)
    assert wait < 0.05 and without > 2 * wait, (wait, without)
    assert service >= 0.99 * whole, (service, whole)


def test_no_slot_is_kept_where_one_tenant_asks():
    m = Simulation(iter([Arrival(0.0, "only", 30, 100, again=True) for _ in range(24)]), "fair", MEASURED)
    m.run(5.0)
    assert not m.scheduler._queue.expects_others
    machine = replace(MEASURED, slots=16)
    m = Simulation(iter([Arrival(0.0, "only", 30, 100, again=True) for _ in range(24)]), "fair", machine)
    m.run(5.0)
    assert m.scheduler.status().running == 16


@pytest.mark.parametrize("slo", [0.0, 0.05, 0.25])
def test_where_a_step_is_full_nothing_more_is_taken(slo):
    rng = random.Random(7)
    model, full = StepTime(), 0
    for _ in range(200):
        chunking = Chunking(model, slo, interruptible=rng.random() < 0.5)
        chunking.begin(Features(decodes=rng.randrange(40), context=rng.randrange(9000)), rng.random() < 0.5)
        if rng.random() < 0.3:
            chunking.pause(rng.random() * 0.1)
        for _ in range(8):
            was_full = chunking.is_full
            taken = chunking.take(rng.choice([1, 20, 900]), rng.randrange(3000))
            assert not (was_full and taken)
            full += was_full
        prompt, decodes, context = rng.randrange(500), rng.randrange(40), rng.randrange(9000)
        seconds = 0.004 + 0.001 * prompt + 0.002 * decodes + 5e-7 * context
        model.observe(Features(prompt, decodes, context, prompt * 100.0), seconds * rng.uniform(0.8, 1.2))
    assert full or not slo
