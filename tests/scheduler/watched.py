"""A simulated run in which every bound is checked at every step that it concerns, and what happened counted.

Its loads and what befalls it (cancellations, deadlines, a full queue, requests that never fit, the engine's
death) are drawn from a seed. A violated bound is an AssertionError; what it costs to look is a tenth of the
run.
"""

import itertools
import random
from collections import Counter

from measured import brute_peak

from ktransformers.engine.channel import Lost
from ktransformers.kvcache.blocks import Tier
from ktransformers.scheduler.growth import MOST_PREEMPTIONS
from ktransformers.scheduler.protocol import Cancel
from ktransformers.scheduler.simulator import Machine, ModelledEngine, Simulation, percentile
from ktransformers.scheduler.workload import Arrival, generate

ENGINE = Machine(blocks=32, slots=3, max_batch_tokens=96, max_len=400, urgent_tokens=128, move=0.001)
"""512 tokens of KV: the bounds, which are multiples of that, are as tight as they are large elsewhere."""
PEER = b"simulator"
CHECK_ALL = 256
"""Steps after which all blocks, slots and accounts are counted anew."""


class Watched(Simulation):
    """`bound(self)` is the largest difference of service, in micro-units by weight, that two tenants may come
    to while both have something waiting. `mishaps`: requests are cancelled, never fit, and engines die.
    """

    def __init__(self, loads, seed, bound, settings, predicted=None, mishaps=False, machine=ENGINE):
        super().__init__(generate(loads, 1e9, seed), "fair", machine, seed, settings)
        self.machine = machine
        self.happened = Counter()
        self.late_steps = []
        """Of those that streams waited for: whether they took more than 1.25 of the SLO."""
        self.queue = self.scheduler._queue
        self.work = Counter()
        self.gap = 0
        self.rate = self.left = self.promised = self.largest_step = 0.0
        """The most so far: micro-units a second; what was left of a tenant's running requests by weight when
        one of it was let in; what was promised to it then; micro-units in one step."""
        self._bound = bound
        self._mishaps = mishaps
        self._dice = random.Random(f"mishaps {seed}")
        self._range = {}
        self._requests = {}
        self._time = 0
        self._step_cost = 0
        self._slots = {}
        self._costs = {}
        """Of each request by the number in its prompt: [prompt tokens paid for, micro-units]."""
        self._computed = {}
        self._watch_queue(predicted)
        self._watch_engine()

    # ---- hooks

    def _watch_queue(self, predicted):
        queue = self.queue
        charge, enter, remove, executed = queue.charge, queue.enter, queue.remove, queue.executed
        guess = queue.predicted

        def charged(request, cost):
            assert isinstance(cost, int) and cost >= 0
            self.work[request.tenant.id] += cost
            self._step_cost += cost
            charge(request, cost)

        def entered(request, found):
            self._requests[request.id] = request
            enter(request, found)
            self._let_in(request)

        def removed(request):
            remove(request)
            self._note_idle(request)

        def done(cost, seconds):
            assert cost == self._step_cost, "F10: a step is charged for what it did"
            executed(cost, seconds)
            self._look()
            self.largest_step, self._step_cost = max(self.largest_step, cost), 0

        queue.charge, queue.enter, queue.remove, queue.executed = charged, entered, removed, done
        if predicted is not None:
            count = itertools.count()
            queue.predicted = lambda account: max(1, int(predicted(guess(account), next(count))))

    def _watch_engine(self):
        """A new one."""
        engine = self.scheduler._engine
        self.cache, self.planner, self.estimate = engine.cache, engine.planner, self.scheduler._estimate
        step, plan = self._engine.step, self.planner.plan

        def stepped(what):
            done = step(what)
            self._note_step(what, done)
            return done

        def planned(now):
            before, factor = self.scheduler.counters.preemptions, self.estimate.factor
            self._kept = self.queue.kept
            new = plan(now)
            if self.scheduler.counters.preemptions == before:
                # Both change with the step: what was expected, and kept, when this one was planned counts.
                after, self.estimate.factor = self.estimate.factor, factor
                self._look_at_plan(new)
                self.estimate.factor = after
            return new

        self._engine.step, self.planner.plan = stepped, planned
        take = self.scheduler._outcomes.take

        def taken(engine, plan, done):
            self._account(self._computed.pop(done.n))
            return take(engine, plan, done)

        self.scheduler._outcomes.take = taken

    # ---- F1, F2, F9, F12, F13, F20: after each step

    def _look(self):
        queue, cache = self.queue, self.cache
        level = queue._tenants
        assert level.time >= self._time, "F9: V* went back"
        self._time = level.time
        if queue.rate > self.rate:
            self.rate = queue.rate
        # They stand in the order in which they began to wait, and so does each pair of them.
        have = [(a.name, self.work[a.name] * 1000 // a.milli) for a in queue._with_waiting]
        for (f, had), (g, got) in itertools.combinations(have, 2):
            ahead = had - got
            low, high = self._range.get((f, g)) or (ahead, ahead)
            if low < ahead < high:
                continue
            self._range[f, g] = low, high = min(low, ahead), max(high, ahead)
            if high - low > self.gap:
                self.gap, bound = high - low, self._bound(self)  # which only grows
                assert self.gap <= bound, f"F1, F2: {self.gap / 1e6:.0f} > {bound / 1e6:.0f} units"
        pool = cache.tiers.device
        assert pool.used + pool.free + cache.cached == pool.total, "F13"
        if self.scheduler.counters.steps % CHECK_ALL == 0:
            self.scheduler.check()
            for account in level.members.values():
                kept = account.open or account in queue._lingering or account.counter > level.time
                assert kept, "F20: it has nothing open and no debt, and is still known"

    def _note_idle(self, request):
        """If its tenant has nothing waiting any more, a backlog has ended."""
        name = request.tenant.id
        account = self.queue._tenants.members.get(name)
        if account is None or not account.waiting:
            for pair in [pair for pair in self._range if name in pair]:
                del self._range[pair]

    def _let_in(self, request):
        self._note_idle(request)
        assert request.preempted <= MOST_PREEMPTIONS, "F16"
        self.happened["backfills"] += request is self.planner._entrance._went_ahead_last
        account = self.queue.account(request)
        expected = self.queue.rules.prices.expected
        left = 0
        for r in account.running:
            # The seed is the length of the output; see the simulator.
            left += expected(r, 0, min(r.sampling.seed, r.sampling.max_tokens) - r.emitted)
        self.left = max(self.left, left / account.weight)
        self.promised = max(self.promised, account.pending / account.weight)

    # ---- F5: after each plan

    def _look_at_plan(self, plan):
        """There is no free slot and budget left while the request of the neediest fits, but for what is kept
        for those that are about."""
        planner, cache, queue = self.planner, self.cache, self.queue
        used = plan.tokens if plan is not None else 0
        running = planner.running
        if used >= self.machine.max_batch_tokens or len(running) >= self.machine.slots or planner._paused:
            return
        if self.scheduler._config.tbt_slo:
            return  # what fits into the time of a step is not to be seen from here
        least = queue.least()
        if least is None or (head := least.head()).in_flight:
            return
        if cache.loads.waits(head.table, self.now, planner._entrance._latency):
            return
        size = cache.block_tokens
        found = cache.match(head.table, head.tokens)
        runs = [(-(-len(head.tokens) // size) - len(found), self.estimate.left(head))]
        alone = 0
        for r in running:
            own = len(r.table.blocks) - r.table.hits
            alone += own
            runs.append((own + cache.missing(r.table, r.total), self.estimate.left(r)))
        peak = brute_peak(cache.used - alone + cache.idle(found), runs, size)
        self.happened["waits for room"] += 1
        slots, tokens = map(max, queue.kept, self._kept)
        kept = len(running) >= self.machine.slots - slots or peak > cache.total - -(-tokens // size)
        kept = kept and bool(least.running)
        assert peak > cache.total or kept, "F5: the neediest fits and is not let in"

    # ---- F10, F11: the engine's own account of what it did; F23

    def _note_step(self, step, done):
        for new in step.new:
            self._slots[new.slot] = [new.tokens[new.n_prompt - 1], new.n_prompt, new.computed]
        drawn = {token.slot for token in done.tokens}
        did = []
        for go in step.go_on:
            if self._engine._slots[go.slot].live or go.slot in drawn:
                slot = self._slots[go.slot]
                did.append((slot[0], slot[1], slot[2], slot[2] + go.n_tokens, go.slot in drawn))
                slot[2] += go.n_tokens
        self._computed[step.n] = did
        self.happened["urgent steps"] += step.urgent
        slo = self.scheduler._config.tbt_slo
        if slo and not step.urgent and sum(go.n_tokens > 1 for go in step.go_on) < len(step.go_on):
            self.late_steps.append(done.seconds > 1.25 * slo)

    def _account(self, did):
        prices = self._prices
        for number, n_prompt, start, until, drew in did:
            cost = self._costs.setdefault(number, [0, 0])
            if cost[0] < n_prompt:
                found, computed = min(start, n_prompt), min(until, n_prompt)
                cost[1] += prices.cached * max(0, found - cost[0])
                cost[0] = max(cost[0], found)
                cost[1] += prices.prompt * max(0, computed - cost[0])
                cost[0] = max(cost[0], computed)
            cost[1] += prices.output * drew

    # ---- F14, F15, F22: what befalls it

    def move(self, until=float("inf")):
        if self._mishaps:
            chance = self._dice.random()
            if chance < 0.01 and self._open:
                self._cancel(self._dice.choice(list(self._open)))
            elif chance < 0.012:
                self._ask_too_much()
            elif chance < 0.0121:
                self._die()
        return super().move(until)

    def _cancel(self, request_id):
        request = self._requests.get(request_id)
        self.scheduler.front(PEER, Cancel(request_id), self.now)
        self.scheduler.advance(self.now)
        assert request_id not in self._open, "F14: it has not ended"
        assert request is None or not request.table.blocks, "F15: its blocks are not free"
        self.happened["cancelled"] += 1

    def _ask_too_much(self):
        refused = self.tenants["never"].refused if "never" in self.tenants else 0
        self._submit(Arrival(self.now, "never", self.machine.max_len + 1, 10))
        assert self.tenants["never"].refused == refused + 1, "F22: it was not refused at once"
        self.happened["never fit"] += 1

    def _die(self):
        self._steps.clear()
        self._moved.clear()
        self._computed.clear()
        self._done = self._urgent_done = None
        self.scheduler.engine(Lost(), self.now)
        self.scheduler.check()
        self._engine = ModelledEngine(self.machine, self._dice.getrandbits(32))
        take = type(self.scheduler._outcomes).take
        self.scheduler._outcomes.take = take.__get__(self.scheduler._outcomes)
        self.scheduler.engine(self.machine.ready(), self.now)
        self._watch_engine()
        self.happened["engine deaths"] += 1

    def _event(self, event):
        super()._event(event)
        if event.finish:
            self._requests.pop(event.id, None)

    def _failed(self, failed):
        self.happened[failed.code] += 1
        full = failed.code in ("overloaded", "rate_limited")
        light = self._open[failed.id].arrival.tenant == "light"
        assert not (full and light), "F17: one that asks for less than its share was refused"
        super()._failed(failed)
        self._requests.pop(failed.id, None)

    # ---- the end

    def finish(self):
        """No more arrivals: all that waits is served, all blocks are free, all was charged."""
        self._mishaps, self._next = False, None
        again = self._end

        def last(request_id, pause=0.0):
            again(request_id, pause)
            self._returns.clear()

        self._end = last
        self._returns.clear()
        most = self.now + 10_000.0
        while self._open or self._steps or self._done is not None or self._moved:
            assert self.move() and self.now < most, "F6: somebody waits for ever"
        status = self.scheduler.status()
        assert status.blocks_used == 0 and self.scheduler.open_requests == 0, "F13, F14"
        self.scheduler.check()
        floor = self._prices.floor
        assert sum(self.work.values()) == sum(max(floor, c) for _, c in self._costs.values()), "F10, F11"
        # A tenth would be little, too; 25 % is for adversaries.
        assert status.recomputed_tokens <= 0.25 * status.computed_tokens, "F16"
        light = self.tenants.get("light")
        if light is not None:
            bound = self.dispatch_seconds()
            wait = percentile(light.ttft, 0.99)
            assert wait <= bound, f"F6, F17: {wait:.2f} s > {bound:.2f} s"
        if self.late_steps:
            assert sum(self.late_steps[50:]) <= 0.01 * len(self.late_steps), "F23"
        self.happened["gap"] = self.gap / self._bound(self)
        tiers = self.cache.moves.traffic
        self.happened += Counter(
            preemptions=status.preemptions,
            hits=status.prefix_hit_tokens,
            recomputed=status.recomputed_tokens,
            computed=status.computed_tokens,
            down=tiers[Tier.DEVICE, Tier.HOST].moves,
            up=tiers[Tier.HOST, Tier.DEVICE].moves,
        )
        return self.happened

    # ---- the page's quantities, in micro-units by weight

    def windows(self):
        """Q + B."""
        rules = self.queue.rules
        return (rules.window + rules.backfill) * self.rate

    def theta(self):
        return self.queue.rules.preempt * self.rate

    def dispatch_seconds(self):
        """After so long a request without debt is let in."""
        whole = sum(t.weight for name, t in self.tenants.items() if name != "light")
        return whole * (self.left + self.windows()) / self.rate
