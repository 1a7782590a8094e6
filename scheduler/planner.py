"""From what runs and what waits to the engine's next step. No I/O, no clock: the caller says what time it is.

Two steps may be planned before the first is done, so this is written for a scheduler that knows less than
the engine:

- A sequence may have ended (stop token) in a step whose outcome is not known yet. Its Go is planned all the
  same and the engine ignores it. An end by max_tokens is foreseen (`Request.plan`).
- A slot's blocks go back to the pool when a step is planned that lists the slot in `gone`, and may be given
  away in that same step. That is safe although the step before may be running right now and writing to
  them: the engine does its steps in order, and within one `gone` before `new`, so the old owner's last
  write comes before the new owner's first, and the old owner has no step after. Nor can a reader see them
  change: whoever found such a block in the index holds it, and it is not given away. For the same reason
  the slot itself may be reused in that step.
- Only what done steps computed is made visible to others; what a planned step is computing is not, as it
  may fail.
- A preempted request may have a draw in flight. It is not let in again before that has come back: its token
  is part of the sequence.
- An urgent step is done before, in the middle of or after any step that is in flight when it is planned. So
  it lets in only who takes nothing from them: no slot that one of them lets go, no block that anybody has let
  go since they were planned. Nothing else is planned until it is done.
"""

import bisect
import math

import msgspec

from ktransformers.engine.protocol import Go, NewSeq, Step
from ktransformers.kvcache.blocks import BlockId
from ktransformers.kvcache.manager import KVCache
from ktransformers.scheduler.entrance import Entrance
from ktransformers.scheduler.fair_queue import FairQueue
from ktransformers.scheduler.growth import MOST_PREEMPTIONS, OutputEstimate
from ktransformers.scheduler.request import Request
from ktransformers.scheduler.stats import Counters
from ktransformers.scheduler.step_time import Chunking, Features, StepTime


class Work(msgspec.Struct, frozen=True, gc=False):
    """What one step does for one request."""

    request: Request
    slot: int
    start: int
    """`Request.computed` before it."""
    until: int
    """`Request.computed` once it is done."""
    draws: bool
    keep: int
    """Place of the state that it keeps; -1: none."""
    keep_at: int
    """After so many tokens."""


class Plan(msgspec.Struct, frozen=True, gc=False):
    """One step and what to make of its outcome."""

    step: Step
    work: list[Work]
    tokens: int
    """To be computed."""
    features: Features
    """What its time depends on."""


class _Draft:
    """A step being planned."""

    def __init__(self, budget: int, cache: KVCache, urgent: bool = False) -> None:
        self.budget = budget
        self.urgent = urgent
        self._cache = cache
        self.recomputed = 0
        self.new: list[NewSeq] = []
        self.go_on: list[Go] = []
        self.work: list[Work] = []
        self.planned: set[Request] = set()
        self.prompt = self.decodes = self.context = 0
        self.prompt_context = 0.0

    @property
    def features(self) -> Features:
        return Features(self.prompt, self.decodes, self.context, self.prompt_context)

    def add(self, request: Request, n: int, new_blocks: list[int]) -> None:
        start, slot = request.computed, request.slot
        keep, keep_at = -1, 0
        if request.total - start > 1:
            keep, keep_at = self._cache.keep_state(start, start + n, ends=n == request.remaining)
            self.prompt += n
            self.prompt_context += n * (start + n / 2)
        else:
            self.decodes += 1
            self.context += start
        if start < request.most_computed:
            self.recomputed += min(request.most_computed, start + n) - start
        draws = request.plan(n)
        self.budget -= n
        self.planned.add(request)
        self.go_on.append(Go(slot, n, new_blocks, keep, keep_at))
        self.work.append(Work(request, slot, start, start + n, draws, keep, keep_at))


class Planner:
    """The slots of one engine and who holds them."""

    def __init__(
        self,
        cache: KVCache,
        queue: FairQueue,
        entrance: Entrance,
        step_time: StepTime,
        chunking: Chunking,
        estimate: OutputEstimate,
        counters: Counters,
        slots: int,
        max_sequences: int,
        max_batch_tokens: int,
    ) -> None:
        self.running: list[Request] = []
        """In a slot, by first admission."""
        self._cache = cache
        self._queue = queue
        self._entrance = entrance
        self._step_time = step_time
        self._chunking = chunking
        self._estimate = estimate
        self._counters = counters
        self._max_batch_tokens = max_batch_tokens
        self._max_sequences = max_sequences
        self._free_slots = list(range(slots - 1, -1, -1))
        self._gone: list[int] = []
        self.steps = 0
        """Number of the last one that was planned."""
        self._paused = False
        """The streams sat out the last step."""

    def plan(self, now: float) -> Plan | None:
        """The next step, or None when there is nothing to do."""
        draft = _Draft(self._max_batch_tokens, self._cache)
        self._entrance.grown()
        for victim in self._entrance.victims(self.running):
            self._preempt(victim)
        self._paused = self._may_pause() and self._let_fresh_in(draft, now)
        if not self._paused:
            self._fill(draft, now)
        self._queue.step(now)
        gone, self._gone = self._gone, []
        if not draft.go_on and not gone:
            return None
        self._estimate.stepped()
        return self._planned(draft, gone)

    def plan_urgent(self, now: float, most: int, seconds: float, leaving: set[int]) -> Plan | None:
        """A step of `most` tokens and `seconds` at most, for whole prompts of those without a backlog, to be
        done in the middle of one that is in flight; the slots that those let go are `leaving`. None: for
        nobody."""
        busy = leaving.union(self._gone)
        others = [slot for slot in self._free_slots if slot in busy]
        self._free_slots = [slot for slot in self._free_slots if slot not in busy]
        draft = _Draft(min(most, self._max_batch_tokens), self._cache, urgent=True)
        self._entrance.grown()
        self._chunking.pause(seconds)
        self._let_in(draft, now, fresh=True)
        self._free_slots += others
        if not draft.go_on:
            return None
        self._queue.step(now)
        return self._planned(draft, [])

    def _planned(self, draft: _Draft, gone: list[int]) -> Plan:
        self.steps += 1
        self._cache.step_planned(self.steps)
        self._counters.recomputed_tokens += draft.recomputed
        tokens = draft.prompt + draft.decodes
        step = Step(self.steps, gone, draft.new, draft.go_on, draft.urgent)
        return Plan(step, draft.work, tokens, draft.features)

    def is_long(self, features: Features) -> bool:
        """Whether a step with these takes so long that another one beside it is worth what a step takes
        anyhow."""
        if not self._step_time.warm:
            return False
        return self._step_time.predict(features) > 2 * self._step_time.predict(Features())

    def done(self, work: Work) -> None:
        """A step with this part is done: its full blocks, and the state that it kept, may be shared."""
        request, until = work.request, work.until
        request.in_flight -= 1
        if request.slot == work.slot:
            request.done = until
            if until >= (request.table.committed + 1) * self._cache.block_tokens:
                self._cache.commit(request.table, request.tokens, until)
            if work.keep >= 0:
                self._cache.state_kept(request.table, work.keep, work.keep_at)
        elif work.keep >= 0:
            self._cache.state_lost(work.keep)

    def end(self, request: Request, *, trusted: bool = True) -> None:
        """A request has ended. What it holds is free in the next step; its KV may be found if `trusted`."""
        if request.slot >= 0:
            self._vacate(request, trusted, request.n_prompt)
        elif not trusted:
            # Preempted with the bad draw in flight.
            self._cache.distrust(request.table, request.tokens)

    def gone(self, request: Request) -> None:
        """A waiting request has ended."""
        self._entrance.gone(request)
        self._cache.loads.drop(request.table)

    def check(self) -> None:
        """Errors: AssertionError when blocks or slots are not conserved, or a count is out of order."""
        self._cache.check([request.table for request in self.running])
        self._entrance.check(self.running)
        held = [request.slot for request in self.running]
        if sorted(held + self._free_slots) != list(range(len(held) + len(self._free_slots))):
            raise AssertionError(f"slots are not conserved: held {held}, free {self._free_slots}")
        for r in self.running:
            if not 0 <= r.done <= r.computed <= r.total or self._cache.missing(r.table, r.computed):
                raise AssertionError(f"request {r.id}: done {r.done}, computed {r.computed}, total {r.total}")

    # ---- those that run

    def _fill(self, draft: _Draft, now: float) -> None:
        """Decodes first, by first admission, so that no stream stalls behind a prompt. Then prompts: of those
        without a backlog, of the tenant that is owed most, and of who comes next."""
        preemptions = self._counters.preemptions
        self._decode(draft)
        self._chunking.begin(draft.features, self._queue.hurry)
        if self._queue.has_fresh and self._counters.preemptions == preemptions:
            self._entrance.grown()
            self._let_in(draft, now, fresh=True)
        prompts = [r for r in self.running if r.total - r.computed > 1 and r not in draft.planned]
        self._go_on_with(sorted(prompts, key=lambda r: (*self._queue.prompt_order(r), r.rank)), draft)
        if self._counters.preemptions == preemptions:
            self._entrance.grown()
            self._let_in(draft, now)

    def _may_pause(self) -> bool:
        """Whether a step without the streams is worth its while for the prompt of one who asks seldom: they
        are most of what the next step would take, and were not left out of the last one."""
        if self._paused or not self._queue.has_fresh:
            return False
        streams = [r for r in self.running if r.remaining == 1]
        return self.is_long(Features(decodes=len(streams), context=sum(r.computed for r in streams)))

    def _let_fresh_in(self, draft: _Draft, now: float) -> bool:
        """Only those; whether there were any that could enter."""
        self._chunking.pause(math.inf)
        self._let_in(draft, now, fresh=True)
        return bool(draft.go_on)

    def _decode(self, draft: _Draft) -> None:
        size, add = self._cache.block_tokens, draft.add
        for request in [r for r in self.running if r.total - r.computed == 1]:
            if draft.budget == 0:
                return
            new_blocks: list[BlockId] = []
            if request.computed == len(request.table.blocks) * size:
                # An earlier one of this loop may have taken its place.
                if request.slot < 0 or not self._make_room(request, draft):
                    continue
                new_blocks = self._cache.grow(request.table, request.computed + 1)
            add(request, 1, new_blocks)

    def _go_on_with(self, requests: list[Request], draft: _Draft) -> None:
        for request in requests:
            if draft.budget == 0:
                return
            # An earlier one of this loop may have taken its place.
            if request.slot >= 0 and (n := self._make_room(request, draft)):
                if n > 1:
                    n = self._chunking.take(n, request.computed)
                if n:
                    draft.add(request, n, self._cache.grow(request.table, request.computed + n))

    def _make_room(self, request: Request, draft: _Draft) -> int:
        """How many tokens of it fit now. Takes blocks from those who came after it, never from those before.

        So the oldest always gets on, and who finds nobody to take from can wait: those before him will leave.
        """
        n = min(request.remaining, draft.budget)
        while (fits := self._room(request)) <= 0:
            victim = self._gives_way(request, draft)
            if victim is None:
                return 0
            self._estimate.preempted()
            self._preempt(victim)
        return min(n, fits)

    def _gives_way(self, request: Request, draft: _Draft) -> Request | None:
        """Who makes room for it, of those that came later: of the tenant that holds most KV for its weight
        the one that has computed least, which is least to compute again. Who had to often enough stays,
        unless the oldest could not get on."""
        oldest = request is self.running[0]
        found, best = None, (-1.0, 0)
        for other in reversed(self.running):
            if other.rank <= request.rank:
                break
            movable = other.preempted < MOST_PREEMPTIONS or oldest
            if other.remaining and other not in draft.planned and movable:
                account = self._queue.account(other)
                held = sum(len(r.table.blocks) for r in account.running) / account.weight
                if (held, -other.computed) > best:
                    found, best = other, (held, -other.computed)
        return found

    def _room(self, request: Request) -> int:
        """Tokens that it could compute with the blocks that it has and those that can be had."""
        blocks = len(request.table.blocks) + self._cache.available
        return blocks * self._cache.block_tokens - request.computed

    def _preempt(self, request: Request) -> None:
        """Back to the queue. Its full blocks stay in the index, so that it goes on by a hit if they last."""
        self._counters.preemptions += 1
        self._entrance.put_back(request)
        request.preempted += 1
        self._vacate(request, trusted=True)
        self._queue.push_front(request)

    def _vacate(self, request: Request, trusted: bool, prompt: int = 0) -> None:
        """`prompt`: tokens of its prompt, if it has ended."""
        self.running.remove(request)
        self._gone.append(request.slot)
        self._free_slots.append(request.slot)
        if trusted:
            self._cache.release(request.table, prompt)
        else:
            self._cache.discard(request.table)
        request.leave()
        self._queue.leave(request)
        self._entrance.left(request)

    # ---- those that wait

    def _let_in(self, draft: _Draft, now: float, fresh: bool = False) -> None:
        while self._free_slots and len(self.running) < self._max_sequences:
            if not draft.budget or (fresh and not self._queue.has_fresh):
                return
            # Asking who is next also begins to load what it will need.
            if self._chunking.is_full and not self._cache.tiered:
                return
            entry = self._entrance.choose(self.running, now)
            if entry is None:
                return
            request = entry.request
            if fresh and not self._queue.is_fresh(self._queue.account(request)):
                return
            wanted = len(request.tokens) - len(entry.found) * self._cache.block_tokens
            allowed = self._chunking.take(min(wanted, draft.budget), len(request.tokens) - wanted)
            if not allowed:
                return
            aside: list[BlockId] | None = []
            if draft.urgent:
                # What is left of a longer one comes in order, and where it begins makes no difference.
                whole = allowed == wanted
                tokens = len(request.tokens)
                aside = self._cache.set_aside(request.table, entry.found, tokens) if whole else None
            if aside is None:
                return
            self._enter(request, entry.found, now)
            draft.new.append(
                NewSeq(
                    slot=request.slot,
                    tokens=list(request.tokens),
                    n_prompt=request.n_prompt,
                    computed=request.computed,
                    sampling=request.sampling,
                    state=request.table.state,
                )
            )
            request.table.blocks += aside
            n = min(allowed, self._room(request))
            self._cache.grow(request.table, request.computed + n)
            draft.add(request, n, list(request.table.blocks))

    def _enter(self, request: Request, found: list[int], now: float) -> None:
        hit_tokens = len(found) * self._cache.block_tokens
        self._queue.enter(request, hit_tokens)
        self._entrance.entered(request)
        self._cache.attach(request.table, found, again=request.entered)
        request.enter(self._free_slots.pop(), hit_tokens)
        if not request.entered:
            self._counters.entered += 1
            request.rank = self._counters.entered
            request.entered = True
            request.queue_seconds = now - request.submitted
            request.cached_tokens = request.computed
            self._counters.prefix_query_tokens += request.n_prompt
            self._counters.prefix_hit_tokens += request.computed
        bisect.insort(self.running, request, key=lambda r: r.rank)
