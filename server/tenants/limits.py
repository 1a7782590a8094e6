"""How much a project, and each of its keys, may ask for.

Rates are GCRA (the generic cell rate algorithm, ITU-T I.371): a bucket that holds one minute's worth and
refills evenly, kept as the one time at which it would be full again. Tokens are reserved as an estimate
(prompt, and max_tokens for each answer) before anything is computed, and settled when it is known how many
there were. All of it happens on one event loop, between two awaits, so that it is exact however many requests
come at once.

A day's quota is kept with the same estimates: what is used and what the open requests have reserved stay
within it together. One request alone is let in when its prompt fits, whatever its output may come to: with
max_tokens not set the estimate is a whole context, and the rest of many a quota would be of no use. While it
runs nobody is let in beside it. So a day's sum is at most the quota and the output of one request.

What is exceeded here is the client's own limit (429); that the server is full is another matter (503).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ktransformers.server.errors import RequestError
from ktransformers.server.tenants.records import NO_LIMITS, Limits, Used
from ktransformers.server.tenants.usage import DAY

MINUTE = 60.0


class Rate:
    """A bucket of `limit` units that refills in a minute. Times are seconds of a monotonic clock."""

    def __init__(self, limit: int, full_at: float = -math.inf) -> None:
        self.limit = limit
        self.full_at = full_at
        """When it will be full, if nothing more is taken."""

    def seconds_until(self, units: int, now: float) -> float:
        """How long until so many can be taken; 0 is now. More than the bucket holds need a full bucket."""
        level_at = self.full_at - MINUTE * (1 - min(units, self.limit) / self.limit)
        # Within a nanosecond is now: the sum of many small steps is not exact.
        return level_at - now if level_at - now > 1e-9 else 0.0

    def take(self, units: int, now: float) -> None:
        """Take them, whether or not they are there; what is missing has to be waited for by the next."""
        self.full_at = max(self.full_at, now) + units * MINUTE / self.limit

    def give_back(self, units: int) -> None:
        """Some were not needed."""
        self.full_at -= units * MINUTE / self.limit

    def left(self, now: float) -> int:
        """Whole units that could be taken now."""
        missing = max(0.0, self.full_at - now) / MINUTE
        return max(0, math.floor(self.limit * (1 - missing) + 1e-6))


@dataclass
class _Subject:
    """A project or a key."""

    limits: Limits = NO_LIMITS
    requests: Rate | None = None
    tokens: Rate | None = None
    day: int = 0
    used: int = 0
    """Tokens on that day."""
    asked: int = 0
    """Requests on that day."""
    reserved: int = 0
    """Tokens of open requests' estimates."""
    open: int = 0
    """Answers."""

    def follow(self, limits: Limits) -> None:
        """The limits as they are now. A bucket that changes its size keeps how full it is."""
        if limits is self.limits:
            return
        self.limits = limits
        self.requests = _resized(self.requests, limits.requests_per_minute)
        self.tokens = _resized(self.tokens, limits.tokens_per_minute)


def _resized(rate: Rate | None, limit: int | None) -> Rate | None:
    if limit is None:
        return None
    return Rate(limit) if rate is None else Rate(limit, rate.full_at)


Subjects = Sequence[tuple[str, Limits]]
"""Whose limits a request has to keep: (id of the project, its limits), (id of the key, its limits)."""


@dataclass
class Reservation:
    """What one call has taken. `settle` it once it is over, however it ends."""

    headers: Mapping[str, str]
    """x-ratelimit-*, for the answer."""
    _taken: list[tuple[_Subject, int]]
    """From each subject so many tokens per minute."""
    _estimate: int
    _answers: int
    _settled: bool = False

    def settle(self, tokens: int, refused: bool = False) -> None:
        """So many there were in truth. `refused`: the server did not take the request, so that it does not
        count as one. A second time does nothing."""
        if self._settled:
            return
        self._settled = True
        for subject, taken in self._taken:
            subject.open -= self._answers
            subject.reserved -= self._estimate
            subject.used += tokens
            if subject.tokens is not None:
                subject.tokens.give_back(taken - tokens)
            if refused:
                subject.asked = max(0, subject.asked - 1)
                if subject.requests is not None:
                    subject.requests.give_back(1)


class Limiter:
    """One for each process. `used_today`: by id of project and key, from before this process."""

    def __init__(
        self,
        used_today: Mapping[str, Used] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._wall = clock, wall
        self._used_before = used_today or {}
        self._first_day = int(wall()) // DAY
        self._subjects: dict[str, _Subject] = {}

    def check(self, subjects: Subjects) -> None:
        """Refuse early, before a prompt is looked at, what would be refused anyway. Takes nothing.

        Raises RequestError: rate_limit_exceeded, insufficient_quota.
        """
        now = self._clock()
        found = self._find(subjects)
        for subject in found:
            self._check_rates(subject, found, 1, now)
            self._check_day(subject, 1, 1)

    def reserve(self, subjects: Subjects, prompt: int, output: int, answers: int) -> Reservation:
        """Take one request, `prompt` + `output` tokens (of all answers together), and room for the answers.

        Raises RequestError: rate_limit_exceeded, insufficient_quota; context_length_exceeded for a prompt
        beyond a whole day's quota, invalid_value for more answers than may ever be open.
        """
        now, estimate = self._clock(), prompt + output
        found = self._find(subjects)
        for subject in found:
            self._check_fits(subject, prompt)
            self._check_rates(subject, found, estimate, now)
            self._check_day(subject, prompt, estimate)
            self._check_open(subject, answers)
        taken = []
        for subject in found:
            subject.open += answers
            subject.asked += 1
            subject.reserved += estimate
            if subject.requests is not None:
                subject.requests.take(1, now)
            # An estimate larger than the bucket takes all there is; the rest is settled when it is known.
            tokens = 0 if subject.tokens is None else min(estimate, subject.tokens.limit)
            if subject.tokens is not None:
                subject.tokens.take(tokens, now)
            taken.append((subject, tokens))
        return Reservation(_headers(found, now), taken, estimate, answers)

    def _find(self, subjects: Subjects) -> list[_Subject]:
        found, day = [], int(self._wall()) // DAY
        for name, limits in subjects:
            subject = self._subjects.get(name)
            if subject is None:
                used = self._used_before.get(name, Used()) if day == self._first_day else Used()
                subject = self._subjects[name] = _Subject(day=day, used=used.tokens, asked=used.requests)
            subject.follow(limits)
            if day > subject.day:  # a clock that is set back does not give the quota anew
                subject.day, subject.used, subject.asked = day, 0, 0
            found.append(subject)
        return found

    def _check_rates(self, subject: _Subject, found: list[_Subject], tokens: int, now: float) -> None:
        for rate, units, name in ((subject.requests, 1, "requests"), (subject.tokens, tokens, "tokens")):
            if rate is not None and (wait := rate.seconds_until(units, now)) > 0:
                raise RequestError(
                    "rate_limit_exceeded",
                    f"your limit of {rate.limit} {name} per minute is reached; wait {_duration(wait)}",
                    retry_after=wait,
                    headers=_headers(found, now),
                )

    def _check_fits(self, subject: _Subject, prompt: int) -> None:
        """Waiting until tomorrow would not help."""
        limit = subject.limits.tokens_per_day
        if limit is not None and prompt > limit:
            what = f"the prompt has {prompt} tokens, more than your quota of {limit} tokens a day"
            raise RequestError("context_length_exceeded", what)

    def _check_day(self, subject: _Subject, prompt: int, estimate: int) -> None:
        most = subject.limits.requests_per_day
        if most is not None and subject.asked >= most:
            raise _used_up(f"your quota of {most} requests a day is used up")
        limit = subject.limits.tokens_per_day
        if limit is None:
            return
        if subject.used >= limit:
            raise _used_up(f"your quota of {limit} tokens a day is used up")
        if subject.used + prompt > limit:
            left = f"{limit - subject.used} of your quota of {limit} tokens a day are left"
            raise _used_up(f"{left}, and this prompt has {prompt}: it does not fit")
        # Open requests may need less than they reserved, so this one may fit in a moment.
        if subject.reserved and subject.used + subject.reserved + estimate > limit:
            raise RequestError(
                "rate_limit_exceeded",
                f"your open requests may use up your quota of {limit} tokens a day; try again when they end",
                retry_after=5.0,
            )

    def _check_open(self, subject: _Subject, answers: int) -> None:
        limits = subject.limits
        if limits.max_running is None:
            return
        most = limits.max_running + (limits.max_waiting or 0)
        if answers > most:
            raise RequestError("invalid_value", f"'n': your limit is {most} answers at one time", "n")
        if subject.open + answers > most:
            raise RequestError(
                "rate_limit_exceeded",
                f"your limit of {most} answers at one time is reached; try again when one ends",
                retry_after=1.0,
            )


def _used_up(what: str) -> RequestError:
    return RequestError(
        "insufficient_quota", f"{what} until midnight UTC", headers={"x-should-retry": "false"}
    )


def _headers(found: list[_Subject], now: float) -> dict[str, str]:
    """OpenAI's headers, of the subject that has the least left."""
    headers: dict[str, str] = {}
    for name in ("requests", "tokens"):
        rates = [rate for subject in found if (rate := getattr(subject, name)) is not None]
        if rates:
            tightest = min(rates, key=lambda rate: rate.left(now))
            headers[f"x-ratelimit-limit-{name}"] = str(tightest.limit)
            headers[f"x-ratelimit-remaining-{name}"] = str(tightest.left(now))
            headers[f"x-ratelimit-reset-{name}"] = _duration(max(0.0, tightest.full_at - now))
    return headers


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 17ms, 3s, 1m30s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole // 60}m{whole % 60}s" if whole >= 60 else f"{whole}s"
