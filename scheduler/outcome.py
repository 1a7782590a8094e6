"""What a step that is done means to its requests: KV that may be shared, charges, tokens, ends."""

from collections.abc import Callable

from ktransformers.engine.protocol import SlotToken, StepDone
from ktransformers.scheduler.charges import Prices
from ktransformers.scheduler.engine_life import EngineLife
from ktransformers.scheduler.fair_queue import FairQueue
from ktransformers.scheduler.growth import OutputEstimate
from ktransformers.scheduler.planner import Plan
from ktransformers.scheduler.protocol import Failed, Logprobs, TokenEvent
from ktransformers.scheduler.request import Request
from ktransformers.scheduler.stats import Counters, Pace

Tell = Callable[[bytes, TokenEvent], None]
"""To a front end."""
End = Callable[[Request, TokenEvent | Failed], None]
"""It ends with this, and what it computed is to be trusted, unless the end is a `numerical_error`."""


class Outcomes:
    """Of the steps of one engine after another."""

    def __init__(
        self,
        prices: Prices,
        queue: FairQueue,
        estimate: OutputEstimate,
        counters: Counters,
        pace: Pace,
        tell: Tell,
        end: End,
    ) -> None:
        self.prices = prices
        self._queue = queue
        self._estimate = estimate
        self._counters = counters
        self._pace = pace
        self._tell = tell
        self._end = end

    def take(self, engine: EngineLife, plan: Plan, done: StepDone) -> list[int]:
        """A step was done as planned. Returns the slots that should have drawn a token and did not."""
        self._pace.measured(done.computed, done.seconds)
        self._counters.steps += 1
        self._counters.step_seconds += done.seconds
        self._counters.computed_tokens += done.computed
        # Less was computed than planned when a sequence had ended in the step before.
        if done.computed == plan.tokens:
            engine.step_time.observe(plan.features, done.seconds)
        token_of = {token.slot: token for token in done.tokens}.get
        cost, silent = 0, []
        executed, charge, note_done = self.prices.executed, self._queue.charge, engine.planner.done
        take_draw = self._take_draw
        for work in plan.work:
            request, token = work.request, token_of(work.slot)
            note_done(work)
            # Of one that has finished the engine knew before this step, and did nothing.
            if not request.finished:
                drew = False
                if token is not None:
                    drew = token.finish != "error"
                    request.finished = token.finish != ""
                # Be it cancelled meanwhile: it was done.
                due = executed(request, work.start, work.until, drew)
                charge(request, due)
                cost += due
            if request.ended:
                continue  # meanwhile: the draw is nobody's
            if token is not None:
                take_draw(request, token)
            elif work.draws:
                silent.append(work.slot)
        self._queue.executed(cost, done.seconds)
        return silent

    def _take_draw(self, request: Request, token: SlotToken) -> None:
        finish = token.finish
        if finish == "error":
            self._end(request, Failed(request.id, "numerical_error", "the model's output was not finite"))
            return
        drawn = token.token
        request.tokens.append(drawn)
        self._counters.generated_tokens += 1
        logprobs = [Logprobs(token.logprob, token.top)] if request.sampling.logprobs >= 0 else []
        if request.emitted:
            event = TokenEvent(request.id, [drawn], logprobs, finish)
        else:
            cached, waited = request.cached_tokens, request.queue_seconds
            event = TokenEvent(request.id, [drawn], logprobs, finish, cached, waited)
        request.emitted += 1
        if finish:
            self._estimate.ended(request.tenant.id, request.emitted)
            self._queue.ended(request)
            self._end(request, event)
        else:
            self._tell(request.peer, event)
