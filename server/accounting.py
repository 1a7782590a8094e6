"""What a call costs: counted once for the answer's usage, the tenant's ledger and limits, and the metrics."""

import time
from dataclasses import dataclass, field

from ktransformers.scheduler.protocol import TokenEvent
from ktransformers.server.metrics import Metrics, TenantSeries
from ktransformers.server.tenants.ledger import Ledger
from ktransformers.server.tenants.limits import Reservation
from ktransformers.server.text.reasoning import Reasoning

REPORT_SECONDS = 0.1
"""How far metrics and ledger may be behind what an answer has put out."""


@dataclass
class Usage:
    """Counted while the deltas are read; whole once they have ended. Times are time.monotonic() seconds."""

    prompt_tokens: int
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    """Among those of the completion."""
    cached_tokens: int = 0
    submitted: float = field(default_factory=time.monotonic)
    first_token: float = 0.0
    last_token: float = 0.0


class Account:
    """What one call costs its tenant, as it becomes known: in the answer's usage, the ledger, the limits and
    the tenant's metrics."""

    def __init__(
        self,
        usage: Usage,
        ledger: Ledger,
        reservation: Reservation,
        series: TenantSeries,
        subject: tuple[str, str, str],
    ) -> None:
        """`subject` is (project, key, model), as the ledger names them."""
        self.usage = usage
        self._ledger, self._reservation, self._series = ledger, reservation, series
        self._subject = subject
        self._prompts: set[int] = set()
        self._tokens = 0
        self._failure = ""

    @property
    def tenant(self) -> str:
        """Its project, as the ledger names it."""
        return self._subject[0]

    def begin(self, prompt: int, prompt_tokens: int, event: TokenEvent) -> None:
        """The first token of an answer to a prompt, which counts once."""
        now = time.monotonic()
        self.usage.first_token = self.usage.first_token or now
        self._series.first_token.observe(now - self.usage.submitted)
        self._series.queue.observe(event.queue_seconds)
        if prompt in self._prompts:
            return
        first = not self._prompts
        self._prompts.add(prompt)
        self.usage.cached_tokens += event.cached_tokens
        self._tokens += prompt_tokens
        self._series.prompt_tokens.inc(prompt_tokens)
        self._ledger.add(
            self._subject, requests=int(first), input=prompt_tokens, cached=event.cached_tokens
        )

    def output(self, tokens: int, reasoning: int) -> None:
        """Tokens of any answer, and how many of them were reasoning."""
        self.usage.completion_tokens += tokens
        self.usage.reasoning_tokens += reasoning
        self._tokens += tokens
        self._series.output_tokens.inc(tokens)
        self._ledger.add(self._subject, output=tokens, reasoning=reasoning)

    def fail(self, code: str) -> None:
        """An answer failed."""
        self._failure = self._failure or code

    def close(self) -> None:
        """Every answer has ended."""
        refused = bool(self._failure) and not self._prompts
        self._reservation.settle(self._tokens, refused)
        if refused:
            self._series.rejected(self._failure)
            return
        self._series.requests.inc()
        if not self._prompts:  # its client left before anything was computed
            self._ledger.add(self._subject, requests=1)


class Counted:
    """Counts one choice in the metrics and in its call's account, and sees to it that it is counted once.

    What it has put out is reported now and then: to count every token in each place took a fifth of what a
    token costs here.
    """

    def __init__(
        self,
        metrics: Metrics,
        account: Account,
        prompt: int,
        prompt_tokens: int,
        reasoning: Reasoning | None = None,
    ) -> None:
        """`reasoning` knows how many of its tokens are that."""
        self._reasoning, self._reported_reasoning = reasoning, 0
        self._metrics, self._account, self._usage = metrics, account, account.usage
        self._prompt, self._prompt_tokens, self._output_tokens = prompt, prompt_tokens, 0
        self._last = self._usage.submitted
        self._reported, self._report_at = 0, 0.0
        self._ended = False

    def event(self, event: TokenEvent) -> None:
        """News of the choice."""
        now, n = time.monotonic(), len(event.tokens)
        if not self._output_tokens and n:
            self._metrics.first_token.observe(now - self._usage.submitted)
            self._metrics.queue.observe(event.queue_seconds)
            self._metrics.prompt_tokens.inc(self._prompt_tokens)
            self._metrics.cached_tokens.inc(event.cached_tokens)
            self._account.begin(self._prompt, self._prompt_tokens, event)
        elif n:
            self._metrics.between_tokens.observe((now - self._last) / n, n)
        self._output_tokens += n
        self._usage.last_token = self._last = now
        if now >= self._report_at:
            self._report_at = now + REPORT_SECONDS
            self._report()

    def _report(self) -> None:
        n, self._reported = self._output_tokens - self._reported, self._output_tokens
        thought = 0
        if self._reasoning is not None:
            thought = self._reasoning.tokens - self._reported_reasoning
            self._reported_reasoning += thought
        self._metrics.output_tokens.inc(n)
        self._account.output(n, thought)

    def finish(self, reason: str) -> None:
        """It ended by itself."""
        self._ended = True
        self._report()
        self._metrics.finished(reason)
        self._metrics.request.observe(self._last - self._usage.submitted)
        self._metrics.prompt_length.observe(self._prompt_tokens)
        self._metrics.output_length.observe(self._output_tokens)

    def fail(self, code: str) -> None:
        """It ended with an error."""
        self._ended = True
        self._metrics.failed(code)
        self._account.fail(code)

    def leave(self) -> None:
        """Nobody reads it any more; a client's leaving is counted if it had not ended."""
        self._report()
        if not self._ended:
            self._metrics.finished("cancelled")
