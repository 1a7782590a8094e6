"""Models whose sequences have a state beside their KV: what is found again, and that nothing else changes.

The engine (step_engine) checks with each step that a sequence begins with its own state.
"""

import random

import pytest
from world import World

MODEL = {"kept_states": 8, "blocks": 400, "max_len": 256}


def prompt(n, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(n)]


def kept(w):
    return w.scheduler._engine.cache.tiers.states.kept


def cached(w, id_, tokens, **options):
    """How much of a request is found."""
    w.submit(id_, tokens, **options)
    w.run()
    return w.first[id_].cached_tokens


def test_a_prompt_is_found_as_far_as_its_last_whole_block():
    w = World(**MODEL)
    assert cached(w, "a", prompt(42)) == 0
    assert cached(w, "b", prompt(42)) == 40
    # A whole number of blocks: one token at least is computed.
    assert cached(w, "c", prompt(80, 1)) == 0
    assert cached(w, "d", prompt(80, 1)) == 76
    # The KV of what is in between is known, but no state is.
    assert cached(w, "e", prompt(30)) == 0
    w.check_drained()


def test_a_conversation_is_found_as_far_as_its_last_prompt():
    w = World(**MODEL)
    cached(w, "a", prompt(42), max_tokens=12)
    assert cached(w, "b", prompt(42) + w.tokens["a"] + prompt(9, 1)) == 40
    # And so is the next turn, by the state of the last.
    assert cached(w, "c", prompt(42) + w.tokens["a"] + prompt(9, 1) + prompt(7, 2)) == 60


@pytest.mark.parametrize("budget", [3, 16, 100])
def test_a_prompt_keeps_one_state_whatever_its_chunks(budget):
    w = World(**MODEL, max_batch_tokens=budget)
    cached(w, "a", prompt(90))
    assert kept(w) == 1
    assert cached(w, "b", prompt(90)) == 88


def test_a_state_that_was_found_stays_when_a_longer_prompt_goes_on_from_it():
    w = World(**MODEL)
    cached(w, "system", prompt(40) + prompt(3, 1))
    for i in range(4):
        assert cached(w, f"r{i}", prompt(40) + prompt(3, 1) + prompt(30, 2 + i)) == 40
    assert kept(w) == 5


def test_of_two_that_compute_the_same_at_once_one_state_stays():
    w = World(**MODEL)
    w.submit("a", prompt(30), advance=False)
    w.submit("b", prompt(30))
    w.run()
    assert kept(w) == 1
    w.check_drained()


def test_where_there_are_no_places_nothing_is_found_and_all_is_answered():
    for places in (0, 1):
        w = World(**(MODEL | {"kept_states": places}))
        for i in range(6):
            w.submit(f"r{i}", prompt(30, i % 2))
        w.run()
        w.check_drained()
        assert kept(w) == places
    assert cached(World(reuse=False, **MODEL), "a", prompt(30)) == 0


def test_a_state_goes_with_its_block():
    w = World(**(MODEL | {"blocks": 64}))
    cached(w, "a", prompt(60))
    for i in range(4):
        cached(w, f"r{i}", prompt(200, 1 + i))
    assert cached(w, "b", prompt(60)) == 0
    assert kept(w) <= 2
    w.check_drained()


def test_what_is_not_to_be_trusted_is_not_found():
    w = World(**MODEL)
    cached(w, "a", prompt(40))
    w.engine.poison.add(0)
    w.submit("b", prompt(40) + prompt(20, 1))
    w.run()
    assert w.failures["b"].code == "numerical_error"
    assert kept(w) == 0
    assert cached(w, "c", prompt(40)) == 0


def test_preemptions_and_cancels_change_nothing():
    w = World(blocks=24, block_tokens=4, max_len=90, max_sequences=8, max_batch_tokens=32, kept_states=3)
    w.scheduler._estimate.prior = 0.0
    for i in range(14):
        w.submit(f"r{i}", prompt(8 + i, i % 5), max_tokens=60, seed=i)
    for i in (12, 3, 13):
        for _ in range(5):
            w.engine_step()
        w.cancel(f"r{i}")
    w.run()
    w.check_drained()
    assert w.status.preemptions > 0
    assert set(w.ends.values()) == {"length", "cancelled"}
