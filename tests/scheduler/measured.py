"""A simulated run that is looked at from inside after every event: service, backlog, keys, KV."""

import itertools
import os
from collections import defaultdict
from dataclasses import replace

from ktransformers.scheduler.charges import UNIT
from ktransformers.scheduler.simulator import Machine, Simulation
from ktransformers.scheduler.workload import Load, generate

SMALL = Machine(blocks=256, slots=16, max_batch_tokens=256, max_len=1024, noise=0.05)
"""4,096 tokens of KV."""


SEEDS = range(int(os.environ.get("FAIRNESS_SEEDS", "2")))
"""20 in `make nightly`, with the large engine; `make test` has 20 with a small one (test_long_runs.py)."""
NIGHTLY = "FAIRNESS_SEEDS" in os.environ
SECONDS = float(os.environ.get("FAIRNESS_SECONDS", "60"))
"""Simulated, about 16 steps each; 6,250 in `make nightly`, which is 10^5 steps."""


class Measured(Simulation):
    """Exact service by tenant, and how far apart two of them get while both have something waiting."""

    def __init__(
        self, loads, policy="fair", machine=SMALL, seed=0, seconds=1e9, settings=None, arrivals=None
    ):
        arrivals = generate(loads, seconds, seed) if arrivals is None else arrivals
        super().__init__(arrivals, policy, machine, seed, settings)
        self.machine = machine
        self.queue = self.scheduler._queue
        self.work = defaultdict(int)
        """Micro-units charged by tenant."""
        self.charged_requests = {}
        self.rate = 0.0
        """The highest service rate seen, micro-units a second."""
        self.gap = 0.0
        """The largest difference of service by weight over any time in which both had something waiting."""
        self.key_gap = 0
        self.largest_step = 0.0
        self.held = defaultdict(int)
        """The most blocks that the running requests of a tenant have held."""
        self.last_time = 0
        self._range = {}
        self._at_last = {}
        charge = self.queue.charge

        def counted(request, cost):
            assert isinstance(cost, int) and cost >= 0
            self.work[request.tenant.id] += cost
            self.charged_requests[request.id] = request
            charge(request, cost)

        self.queue.charge = counted
        self.left_at_admission = 0.0
        """The most that was left, by weight, to be charged to what ran of a tenant when one of it was let in.
        """
        enter = self.queue.enter

        def entered(request, found):
            enter(request, found)
            account = self.queue.account(request)
            left = sum(map(self._left, account.running)) / account.weight
            self.left_at_admission = max(self.left_at_admission, left)

        self.queue.enter = entered

    def move(self, until=float("inf")):
        going = super().move(until)
        self._look()
        return going

    def _left(self, request):
        # The seed is the length of the output; see the simulator.
        outputs = min(request.sampling.seed, request.sampling.max_tokens) - request.emitted
        return self.queue.rules.prices.expected(request, 0, outputs)

    def _look(self):
        queue = self.queue
        assert queue._tenants.time >= self.last_time, "V* went back"
        self.last_time = queue._tenants.time
        self.rate = max(self.rate, queue.rate)
        accounts = queue._tenants.members
        waiting = {name: a for name, a in accounts.items() if a.waiting}
        for name, account in accounts.items():
            if account.running:
                blocks = sum(len(r.table.blocks) for r in account.running)
                self.held[name] = max(self.held[name], blocks)
        for pair in itertools.combinations(sorted(waiting), 2):
            f, g = (self.work[name] / waiting[name].weight for name in pair)
            low, high = self._range.get(pair, (f - g, f - g))
            self._range[pair] = low, high = min(low, f - g), max(high, f - g)
            self.gap = max(self.gap, high - low)
        for pair in [p for p in self._range if not set(p) <= set(waiting)]:
            del self._range[pair]
        step = sum(self.work.values()) - sum(self._at_last.values())
        self.largest_step = max(self.largest_step, step)
        self._at_last = dict(self.work)

    # ---- the page's quantities, in micro-units by weight

    def u(self, weights, cap=True):
        """max over tenants of w_q M_i / phi_i."""
        tokens = self.machine.blocks * self.machine.block_tokens
        rules = self.queue.rules
        whole = sum(weights.values())
        share = {
            n: min(1.0, rules.kv_share * w / whole) if cap and rules.kv_share else 1.0
            for n, w in weights.items()
        }
        return max(rules.prices.output * tokens * share[n] / w for n, w in weights.items())

    def windows(self):
        """Q + B."""
        rules = self.queue.rules
        return (rules.window + rules.backfill) * self.rate

    def theta(self):
        return self.queue.rules.preempt * self.rate


def closed(name, count=24, **more):
    """A tenant that always has something waiting."""
    return Load(name=name, kind="closed", count=count, **more)


def units(micro):
    return micro / UNIT


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


TIGHT = {"fair_window": 0.2, "fair_preempt": 1.0}
HOARD = [closed("a", prompt=30, output=900, count=40), closed("b", prompt=200, output=20, count=8)]


def weights(loads):
    return {load.name: load.weight for load in loads}


def unpredicting(queue):
    class Unpredicting(queue):
        def __init__(self, rules):
            super().__init__(replace(rules, predict=False))

    return Unpredicting


def brute_peak(shared, runs, size):
    """The most blocks that are held at once, the slow way."""
    by_end = sorted(runs, key=lambda run: run[1])
    held = sum(own for own, _ in by_end)
    peak = held
    for alive, (own, left) in zip(range(len(by_end), 0, -1), by_end, strict=True):
        peak = max(peak, held + alive * -(-left // size))
        held -= own
    return shared + peak
