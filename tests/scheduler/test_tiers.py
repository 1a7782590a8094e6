"""The scheduler with a host pool and a disk, against an engine that sees every byte out of place."""

import signal

from test_scheduler import prompt
from world import World

TIERS = {"host_blocks": 64, "disk_bytes": 64 * 1024}


def served_again(w, tokens, id_="again", **sampling):
    """The same prompt once more; how many of its tokens were found."""
    w.submit(id_, tokens, **sampling)
    w.settle()
    return w.first[id_].cached_tokens


def flooded(w, n=6, seed=1000):
    """Other prompts push everything off the device."""
    for i in range(n):
        w.submit(f"flood{seed + i}", prompt(60, seed + i), max_tokens=2)
        w.settle()


def test_what_was_pushed_off_the_device_comes_back_from_the_host():
    w = World(blocks=32, host_blocks=200)
    tokens = prompt(60)
    w.submit("first", tokens, max_tokens=4)
    w.settle()
    flooded(w)
    cache = w.scheduler._engine.cache
    assert cache.match(cache.open(b""), tokens) == []
    assert served_again(w, tokens) == 56
    assert cache.hit_tokens[1] == 56
    w.check_drained()


def test_a_prompt_sent_twice_is_found_on_disk_by_the_next_engine():
    w = World(blocks=32, disk_bytes=1 << 20)
    tokens = prompt(60)
    w.submit("first", tokens, max_tokens=4)
    w.settle()
    assert not w.disk, "what nobody asks for again is not worth a write"
    assert served_again(w, tokens, "second") == 56
    assert len(w.disk) == 15, "and what was generated, since its tenant comes back"
    w.kill_engine()
    w.start_engine()
    assert served_again(w, tokens, "third") == 56
    w.check_drained()


def test_who_waits_for_a_load_is_waited_for_by_nobody_else():
    w = World(blocks=64, host_blocks=200, max_sequences=4)
    tokens = prompt(100)
    w.submit("first", tokens, max_tokens=2)
    w.settle()
    flooded(w, 8)
    w.submit("loads", tokens, max_tokens=2)
    assert w.engine.mover.under_way and not w.to_do, "it waits"
    w.submit("new", prompt(8, 77), max_tokens=2)
    for _ in range(3):
        w.engine_step()
    w.settle()
    assert w.ends["new"] == w.ends["loads"] == "length"
    assert w.first["loads"].cached_tokens == 96


def test_a_load_that_never_comes_is_computed_instead():
    w = World(blocks=32, host_blocks=200)
    tokens = prompt(60)
    w.submit("first", tokens, max_tokens=2)
    w.settle()
    flooded(w)
    w.submit("late", tokens, max_tokens=2)
    assert w.engine.mover.under_way and not w.to_do
    at = w.scheduler.wake_at(w.now)
    assert at is not None
    w.now = at
    w.advance()
    w.run()
    assert w.ends["late"] == "length" and w.first["late"].cached_tokens == 0
    w.settle()
    w.check_drained()


def test_the_engine_that_answers_no_move_is_replaced():
    w = World(blocks=64, host_blocks=200)
    w.submit("first", prompt(100), max_tokens=2)
    w.run()  # the steps, and no move
    moves = w.scheduler._engine.cache.moves
    assert w.engine.mover.under_way and moves.oldest_sent() is not None
    w.wait(590)
    assert not w.signals
    w.wait(20)
    assert w.signals[0] == (1, signal.SIGABRT)
    while w.finish_move():
        pass
    assert moves.oldest_sent() is None


def test_who_had_to_make_room_goes_on_from_the_host():
    recomputed = {}
    for host_blocks in (0, 200):
        w = World(blocks=32, host_blocks=host_blocks, max_batch_tokens=32)
        w.scheduler._estimate.prior = 0.0  # all are let in, and blocks run out
        for i in range(4):
            w.submit(f"r{i}", prompt(20, i), max_tokens=60)
        w.settle()
        assert w.status.preemptions > 0
        assert (w.scheduler._engine.cache.moves.traffic[1, 0].moves > 0) == (host_blocks > 0)
        recomputed[host_blocks] = w.status.recomputed_tokens
        w.check_drained()
    assert recomputed[200] < recomputed[0] / 2


def test_cancelled_while_loading_leaves_nothing():
    """K12."""
    w = World(blocks=32, host_blocks=200)
    tokens = prompt(60)
    w.submit("first", tokens, max_tokens=2)
    w.settle()
    for i in range(300):
        flooded(w, 3, 5000 + 10 * i)
        w.submit(f"c{i}", tokens, max_tokens=2)
        w.cancel(f"c{i}")
        w.finish_move()
    w.settle()
    w.check_drained()
