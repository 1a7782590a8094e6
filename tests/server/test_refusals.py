"""Nobody is refused without being asked for who might be let in."""

import traceback

from ktransformers.server.errors import RequestError
from ktransformers.server.refusals import IN_LINE_SECONDS, REFUSAL_SECONDS, Refusals

FULL = RequestError("overloaded", "full")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def asks(refusals: Refusals, tenant: str = "a") -> bool:
    """Whether its next request would ask the scheduler."""
    try:
        refusals.check(tenant)
    except RequestError as error:
        assert error is FULL
        return False
    return True


def refuse(refusals: Refusals) -> None:
    refusals.join("a")
    refusals.refused("a", FULL)


def test_who_has_nothing_waiting_asks_again_soon() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    assert asks(refusals)
    refuse(refusals)
    assert not asks(refusals) and asks(refusals, "b")
    clock.now += REFUSAL_SECONDS
    assert asks(refusals)


def test_who_is_in_line_lets_one_ask_now_and_then() -> None:
    clock = Clock()
    refusals = Refusals(clock)
    refusals.join("a")
    refuse(refusals)
    for _ in range(3):
        clock.now += IN_LINE_SECONDS - 0.01
        assert not asks(refusals)
        clock.now += 0.02
        assert asks(refusals) and asks(refusals)  # it is asked before and after the body is read
        refusals.join("a")
        assert not asks(refusals)


def test_a_place_that_its_own_request_leaves_is_asked_for_once() -> None:
    refusals = Refusals(Clock())
    for _ in range(3):
        refusals.join("a")
    refuse(refusals)
    refusals.leave("a")
    refusals.leave("a")
    for _ in range(2):
        assert asks(refusals)
        refusals.join("a")
    assert not asks(refusals)
    # Refused once more: the places were others'.
    refusals.leave("a")
    refuse(refusals)
    assert not asks(refusals)


def test_what_was_left_before_the_refusal_says_nothing() -> None:
    refusals = Refusals(Clock())
    refusals.join("a")
    refusals.join("a")
    refusals.leave("a")
    refuse(refusals)
    assert not asks(refusals)


def test_a_flood_leaves_nothing_behind() -> None:
    refusals = Refusals(Clock())
    refuse(refusals)
    for _ in range(50):
        assert not asks(refusals)
    assert len(traceback.extract_tb(FULL.__traceback__)) < 5
    refusals.join("waits")
    for i in range(5000):
        refusals.join(f"t{i}")
        refusals.refused(f"t{i}", FULL)
    assert len(refusals._lines) <= 1025 and "waits" in refusals._lines
