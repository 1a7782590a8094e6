"""Rates, quotas and reservations, with a clock that is moved by hand."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransformers.server.errors import RequestError
from ktransformers.server.tenants.limits import Limiter, Rate, _duration
from ktransformers.server.tenants.records import NO_LIMITS, Limits, Used


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def refusal(limiter: Limiter, subjects, prompt=1, output=1, answers=1) -> RequestError:
    with pytest.raises(RequestError) as raised:
        limiter.reserve(subjects, prompt, output, answers)
    return raised.value


def test_sixty_and_not_one_more() -> None:
    clock = Clock()
    limiter = Limiter({}, clock)
    subjects = (("p", Limits(requests_per_minute=60)),)
    for _ in range(60):
        limiter.reserve(subjects, 1, 1, 1)
    error = refusal(limiter, subjects)
    assert (error.status_code, error.code) == (429, "rate_limit_exceeded")
    assert error.headers["Retry-After"] == "1"
    assert error.headers["x-ratelimit-limit-requests"] == "60"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert error.headers["x-ratelimit-reset-requests"] == "1m0s"
    clock.now += 1
    limiter.reserve(subjects, 1, 1, 1)
    refusal(limiter, subjects)


@settings(max_examples=200)
@given(st.integers(1, 500), st.lists(st.tuples(st.floats(0, 30), st.integers(1, 800)), max_size=60))
def test_a_rate_never_gives_more_than_a_bucket_and_its_refill(limit: int, asks) -> None:
    """The token-bucket bound over every interval, and that what `seconds_until` promises is there then."""
    rate, now, taken = Rate(limit), 0.0, []
    for pause, units in asks:
        now += pause
        wait = rate.seconds_until(units, now)
        if wait == 0:
            rate.take(min(units, limit), now)
            taken.append((now, min(units, limit)))
        else:
            assert rate.seconds_until(units, now + wait) == 0
            assert rate.seconds_until(units, now + wait - 1e-6) > 0
    for i, (begin, _) in enumerate(taken):
        for j in range(i, len(taken)):
            total = sum(units for _, units in taken[i : j + 1])
            assert total <= limit + (taken[j][0] - begin) * limit / 60 + 1e-6


def test_tokens_are_reserved_and_settled() -> None:
    clock = Clock()
    limiter = Limiter({}, clock)
    subjects = (("p", Limits(tokens_per_minute=1000)),)
    first = limiter.reserve(subjects, 100, 500, 1)
    assert first.headers["x-ratelimit-remaining-tokens"] == "400"
    assert "x-ratelimit-limit-requests" not in first.headers
    assert refusal(limiter, subjects, 100, 301).code == "rate_limit_exceeded"
    first.settle(110)
    first.settle(110)
    second = limiter.reserve(subjects, 100, 790, 1)
    assert second.headers["x-ratelimit-remaining-tokens"] == "0"
    second.settle(0)
    # An estimate beyond the bucket waits for a full one, and the truth is paid for afterwards.
    assert refusal(limiter, subjects, 100, 5000).headers["Retry-After"] == "7"
    clock.now += 7
    limiter.reserve(subjects, 100, 5000, 1).settle(3000)
    assert refusal(limiter, subjects, 1, 1).headers["Retry-After"] == "120"  # 120.12 s, and at most so much
    clock.now += 121
    limiter.reserve(subjects, 1, 1, 1)


def test_a_day_is_a_quota_that_must_not_be_retried() -> None:
    clock, wall = Clock(), Clock(86400.0 * 20000)
    limiter = Limiter({"p": Used(3, 900)}, clock, wall)
    subjects = (("p", Limits(tokens_per_day=1000)),)
    error = refusal(limiter, subjects, 101, 1)
    assert (error.status_code, error.code) == (429, "insufficient_quota")
    assert error.headers == {"x-should-retry": "false"}
    open_ = limiter.reserve(subjects, 50, 400, 1)
    # It may fit once the open one has ended: that is worth another try.
    assert refusal(limiter, subjects, 60, 1).code == "rate_limit_exceeded"
    open_.settle(60)
    limiter.reserve(subjects, 40, 1, 1).settle(41)
    assert refusal(limiter, subjects, 1, 1).code == "insufficient_quota"
    wall.now -= 3600  # a clock that is set back gives nothing
    assert refusal(limiter, subjects, 1, 1).code == "insufficient_quota"
    wall.now += 3600 + 86400
    limiter.reserve(subjects, 999, 1, 1)


def test_what_never_fits_a_day_is_no_matter_of_time() -> None:
    limiter = Limiter({"p": Used(1, 900)}, Clock(), Clock(86400.0 * 20000))
    subjects = (("p", Limits(tokens_per_day=1000)),)
    error = refusal(limiter, subjects, 1001, 1)
    assert (error.status_code, error.code) == (400, "context_length_exceeded")
    assert "1001" in error.message and "1000 tokens a day" in error.message and not error.headers
    error = refusal(limiter, subjects, 1000, 1)  # tomorrow it does
    assert (error.status_code, error.code) == (429, "insufficient_quota") and "100 of" in error.message


def test_requests_of_a_day_are_counted_over_a_restart_and_refused_ones_are_not() -> None:
    wall = Clock(86400.0 * 20000)
    limiter = Limiter({"p": Used(3, 0)}, Clock(), wall)
    subjects = (("p", Limits(requests_per_day=5)),)
    limiter.reserve(subjects, 1, 1, 1).settle(0, refused=True)
    limiter.reserve(subjects, 1, 1, 1).settle(2)
    limiter.reserve(subjects, 1, 1, 1)
    error = refusal(limiter, subjects, 1, 1)
    assert (error.code, error.headers) == ("insufficient_quota", {"x-should-retry": "false"})
    wall.now += 86400
    limiter.reserve(subjects, 1, 1, 1)


def test_a_key_has_limits_of_its_own() -> None:
    limiter = Limiter({}, Clock())
    project = Limits(requests_per_minute=10)
    one, two = (
        (("p", project), (key, Limits(requests_per_minute=3, max_running=2, max_waiting=1)))
        for key in ("one", "two")
    )
    reserved = [limiter.reserve(one, 1, 1, 1) for _ in range(3)]
    assert refusal(limiter, one).headers["x-ratelimit-limit-requests"] == "3"
    for reservation in reserved:
        reservation.settle(2)
    reserved = [limiter.reserve(two, 1, 1, 2)]
    assert refusal(limiter, two, answers=2).code == "rate_limit_exceeded"
    assert refusal(limiter, two, answers=4).code == "invalid_value"  # it would never fit
    limiter.reserve(two, 1, 1, 1)
    assert refusal(limiter, two).code == "rate_limit_exceeded"
    reserved[0].settle(2)
    limiter.reserve(two, 1, 1, 2)


def test_limits_may_change_while_requests_are_open() -> None:
    limiter = Limiter({}, Clock())
    few, more = Limits(requests_per_minute=2), Limits(requests_per_minute=4, tokens_per_minute=100)
    open_ = limiter.reserve((("p", few),), 10, 10, 1)
    limiter.reserve((("p", few),), 10, 10, 1)
    refusal(limiter, (("p", few),))
    refusal(limiter, (("p", more),))  # the bucket grew, and is as empty as it was
    limiter.reserve((("p", NO_LIMITS),), 10, 10, 1)
    open_.settle(20)


def test_a_request_that_the_server_refused_does_not_count() -> None:
    limiter = Limiter({}, Clock())
    subjects = (("p", Limits(requests_per_minute=1)),)
    limiter.reserve(subjects, 1, 1, 1).settle(0, refused=True)
    limiter.reserve(subjects, 1, 1, 1).settle(0)
    refusal(limiter, subjects)


@pytest.mark.parametrize("seed", range(20))
def test_a_day_stays_within_its_quota_and_one_output(seed: int) -> None:
    """Many requests at a time, of which some need all they may: together they stay within the quota, and
    one that nothing ran beside passes it by no more than its output. What is given back is used."""
    rng, quota, day = random.Random(seed), 20_000, Clock(86400.0 * 20000)
    limiter = Limiter({}, Clock(), day)
    subjects = (("p", Limits(tokens_per_day=quota)), ("k", NO_LIMITS))
    open_, used, most_together, alone = [], 0, 0, 0
    for _ in range(3000):
        if rng.random() < 0.6:
            prompt, output = rng.randint(1, 300), rng.choice([1, 50, 900, 30_000])
            try:
                open_.append((limiter.reserve(subjects, prompt, output, 1), prompt, output))
            except RequestError as error:
                wait = "rate_limit_exceeded" if open_ else "insufficient_quota"
                assert error.code == wait or used + prompt > quota
                continue
            may_use = used + sum(p + o for _, p, o in open_)
            if len(open_) > 1:
                assert may_use <= quota
                most_together = max(most_together, len(open_))
            else:
                assert may_use - output <= quota
                alone = output
        elif open_:
            reservation, prompt, output = open_.pop(rng.randrange(len(open_)))
            # All of it; or a part; or nothing, as of one that failed or whose client left at once.
            truth = rng.choice([prompt + output if output < 900 else prompt + 9, prompt, 0])
            reservation.settle(truth, refused=not truth and rng.random() < 0.5)
            used += truth
    for reservation, prompt, output in open_:
        reservation.settle(prompt + output)
        used += prompt + output
    assert quota - 300 < used <= quota + alone and most_together > 3
    subject = limiter._subjects["p"]
    assert (subject.open, subject.reserved, subject.used) == (0, 0, used)
    day.now += 86400
    limiter.reserve(subjects, 1, quota - 1, 1)


@pytest.mark.parametrize("seed", range(20))
def test_at_rest_everything_is_given_back(seed: int) -> None:
    rng, clock = random.Random(seed), Clock()
    limiter = Limiter({}, clock, Clock(86400.0 * 20000))
    subjects = (("p", Limits(tokens_per_minute=5000, tokens_per_day=10**7, max_running=20)),)
    open_, used = [], 0
    for _ in range(2000):
        clock.now += rng.random()
        if rng.random() < 0.5:
            try:
                prompt, output = rng.randint(1, 300), rng.randint(1, 900)
                open_.append((limiter.reserve(subjects, prompt, output, 1), prompt + output))
            except RequestError as error:
                assert error.code == "rate_limit_exceeded"
        elif open_:
            reservation, most = open_.pop(rng.randrange(len(open_)))
            truth = rng.randint(0, most)
            reservation.settle(truth)
            used += truth
    for reservation, most in open_:
        reservation.settle(most)
        used += most
    subject = limiter._subjects["p"]
    assert (subject.open, subject.reserved, subject.used) == (0, 0, used)
    clock.now += subject.tokens.seconds_until(5000, clock.now)
    assert subject.tokens.left(clock.now) == 5000


@pytest.mark.parametrize(("seconds", "text"), [(0, "0ms"), (0.0171, "18ms"), (3, "3s"), (89.5, "1m30s")])
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
