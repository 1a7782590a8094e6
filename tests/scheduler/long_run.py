"""The long runs of one seed: what `test_long_runs.py` hands to its processes."""

import random
from collections import Counter
from dataclasses import replace

from watched import ENGINE, Watched

from ktransformers.scheduler import entrance as entrance_module
from ktransformers.scheduler.simulator import Machine, Simulation
from ktransformers.scheduler.workload import Load, generate

PREDICTORS = (
    lambda right, n: right / 10,
    lambda right, n: right * 10,
    lambda right, n: 0,
    lambda right, n: (1, 4096)[n % 2],
)


def run(seed: int, steps: int) -> Counter:
    """So many steps in four kinds of load; what happened. Errors: AssertionError."""
    happened = Counter()
    for kind in (exact, mistaken, preempting, eventful):
        m = kind(seed)
        try:
            while m.scheduler.counters.steps < steps // 4:
                assert m.move(), "nothing happens any more"
            happened += m.finish()
        except AssertionError as error:
            at = f"seed {seed}, {kind.__name__}, after {m.scheduler.counters.steps} steps"
            raise AssertionError(f"{at}: {error}") from error
    return happened


def _backlogged(seed, **more):
    """Three or four tenants of any weight that always have something waiting."""
    rng = random.Random(f"tenants {seed}")
    loads = [
        Load(
            name=name,
            kind="closed",
            count=rng.choice([8, 16]),
            weight=rng.choice([1.0, 1.0, 2.0, 4.0]),
            prompt=rng.choice([20, 60, 120]),
            output=rng.choice([10, 40, 90]),
            prefix=rng.choice([0, 0, 16]),
            max_tokens=rng.choice([0, 120]),
            users=rng.choice([1, 3]),
            **more,
        )
        for name in "abcd"[: rng.choice([3, 4])]
    ]
    # One that comes and goes, and has nothing waiting most of the time.
    return [*loads, Load(name="e", rate=rng.choice([0.2, 1.0]), prompt=40, output=20)]


def exact(seed):
    """No prediction: what is left of what runs bounds the gap."""
    settings = {"fair_preempt": 0.0, "fair_window": 0.5, "tbt_slo": 0.0}
    m = Watched(_backlogged(seed), seed, lambda m: 2 * (m.left + m.windows()), settings)
    m.queue.rules = replace(m.queue.rules, predict=False)
    return m


def mistaken(seed):
    """A predictor that is wrong."""
    settings = {"fair_preempt": 0.0, "fair_window": 0.5, "tbt_slo": 0.0}
    predictor = PREDICTORS[seed % len(PREDICTORS)]
    return Watched(_backlogged(seed), seed, _any_bound, settings, predictor)


def _any_bound(m):
    return 2 * (m.left + m.promised + m.windows())


def preempting(seed):
    """Long outputs beside short ones, and who is ahead makes room."""
    rng = random.Random(f"hoard {seed}")
    loads = [
        Load(name="a", kind="closed", prompt=rng.choice([10, 40]), output=250, count=12),
        Load(name="b", kind="closed", prompt=120, output=10, count=8, weight=rng.choice([1.0, 2.0])),
    ]
    settings = {"fair_preempt": 1.0, "fair_window": 0.1, "tbt_slo": 0.0}
    m = Watched(loads, seed, lambda m: 2 * (m.theta() + m.largest_step + m.windows()), settings)
    m.queue.rules = replace(m.queue.rules, predict=False)
    # Nothing but the gap decides here: the guard on what is computed again is off.
    m.share, entrance_module._RECOMPUTED_SHARE = entrance_module._RECOMPUTED_SHARE, 1.0
    finish = m.finish

    def finished():
        entrance_module._RECOMPUTED_SHARE = m.share
        return finish()

    m.finish = finished
    return m


def eventful(seed):
    """As it is set up, with all that can befall it: more than it can do, deadlines, talk, visitors."""
    rng = random.Random(f"eventful {seed}")
    loads = [
        Load(name="flood", rate=rng.choice([8.0, 20.0]), prompt=80, output=60, deadline=8.0),
        Load(name="talk", kind="closed", count=8, prompt=150, output=20, prefix=128, topics=4),
        Load(name="writes", kind="closed", count=6, prompt=20, output=150, deadline=20.0),
        Load(name="light", rate=0.2, prompt=40, output=10, fixed=True),
        *(Load(name=f"visitor{i}", rate=0.02, prompt=60, output=20) for i in range(10)),
    ]
    settings = {"max_waiting": 40, "tbt_slo": 0.1, "fair_preempt": 3.0, "fair_window": 0.5}
    machine = replace(ENGINE, host_blocks=24)
    return Watched(loads, seed, _any_bound, settings, mishaps=True, machine=machine)


LONG_OUTPUTS = {
    "beside one that asks seldom": [
        Load(name="flood", kind="closed", prompt=300, output=800, count=48),
        Load(name="seldom", rate=1.0, prompt=50, output=20),
    ],
    "beside short ones": [
        Load(name="flood", kind="closed", prompt=100, output=800, count=48),
        Load(name="short", kind="closed", prompt=300, output=100, count=8),
    ],
}


def recomputed(load: str, seed: int) -> float:
    """Part of all computed tokens that was computed again, in 200 s on an engine with 16,384 tokens of KV."""
    simulation = Simulation(generate(LONG_OUTPUTS[load], 1e9, seed), "fair", Machine(), seed)
    status = simulation.run(200.0).status
    return status.recomputed_tokens / status.computed_tokens
