"""Decisions about slower tiers: what is sent down, what goes first, whose, and what is worth loading."""

import random

import pytest
import three_tiers

from ktransformers.kvcache import manager
from ktransformers.kvcache.blocks import Tier
from ktransformers.kvcache.manager import KVCache, owner_id

SIZE = 4
BYTES = 100


def cache_of(blocks=32, host=0, disk=0, recompute=lambda start, n: None):
    return KVCache(
        blocks, SIZE, b"f", block_bytes=BYTES, host_blocks=host, disk_bytes=disk * BYTES, recompute=recompute
    )


def serve(cache, tokens, tenant="t", scope=b"", prompt=0):
    """A request comes and goes; how many tokens it found."""
    table = cache.open(scope, cache.owner(tenant))
    found = cache.match(table, tokens)
    cache.attach(table, found)
    cache.grow(table, len(tokens))
    cache.commit(table, tokens, len(tokens))
    cache.release(table, prompt)
    return len(found) * SIZE


def settle(cache, now=0.0, fails=False):
    """All moves end."""
    moves = 0
    while transfers := cache.send(now)[0]:
        for t in transfers:
            cache.moves.finish(t.id, not fails, BYTES, 0.001)
        moves += len(transfers)
    return moves


def on(cache, tier):
    return sum(e.committed(tier) is not None for e in cache.tiers.index.entries())


def text(n, seed):
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(n)]


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_found_that_is_not_what_its_name_says(seed):
    seen = three_tiers.run(6000, seed)
    assert all(seen[way] > 5 for way in ("HOST to DEVICE", "DISK to DEVICE", "DEVICE to HOST")), seen


# ---- what is sent down


def test_to_the_host_goes_what_comes_to_rest_and_to_disk_what_is_asked_for_again():
    cache = cache_of(host=50, disk=50)
    serve(cache, text(17, 1))
    settle(cache)
    assert (on(cache, Tier.HOST), on(cache, Tier.DISK)) == (4, 0)
    serve(cache, text(17, 1))
    settle(cache)
    assert (on(cache, Tier.HOST), on(cache, Tier.DISK)) == (4, 4)


def test_a_conversation_that_rests_is_written_as_far_as_its_prompt():
    cache = cache_of(disk=50)
    cache.owner("t").asks(1000, 0)  # it comes back so seldom that not all of it is worth a write
    turn = text(16, 1)
    serve(cache, turn, prompt=9)
    settle(cache)
    turn += text(16, 2)
    serve(cache, turn, prompt=25)
    settle(cache, 10.0)
    assert on(cache, Tier.DISK) == 4, "what the second turn found"
    settle(cache, 45.0)
    assert on(cache, Tier.DISK) == 6, "its prompt, and nothing of its answer"


def test_a_single_question_is_never_written_to_disk():
    cache = cache_of(disk=50)
    serve(cache, text(20, 1), prompt=16)
    settle(cache, 1000.0)
    assert on(cache, Tier.DISK) == 0


def test_all_of_a_tenant_that_comes_back_is_written_and_no_more_when_it_does_so_no_longer():
    cache = cache_of(blocks=4000, disk=4000)
    shared = text(16, 0)
    serve(cache, shared)
    serve(cache, turn := shared + text(17, 1))
    settle(cache)
    assert on(cache, Tier.DISK) == 8, "a third of what it asked for was known"
    serve(cache, turn + text(16, 2), tenant="another", scope=b"another")
    settle(cache)
    assert on(cache, Tier.DISK) == 8, "it was for another tenant"
    for i in range(20):
        serve(cache, text(33, 10 + i))
    settle(cache)
    before = on(cache, Tier.DISK)
    serve(cache, text(33, 100))
    settle(cache)
    assert on(cache, Tier.DISK) == before < 80


def test_a_failed_move_leaves_nothing():
    cache = cache_of(host=50)
    serve(cache, text(17, 1))
    settle(cache, fails=True)
    cache.check([])
    assert on(cache, Tier.HOST) == 0 and cache.used == 0


# ---- what goes first


def test_leaves_go_before_what_they_hang_on_and_what_was_used_more_stays():
    cache = cache_of(blocks=16)
    head, other = text(16, 1), text(16, 2)
    for i in range(4):
        serve(cache, head + text(8, 10 + i))
    serve(cache, other + text(8, 3))
    for i in range(5):
        serve(cache, text(24, 50 + i))
    assert serve(cache, [*head, 1]) == 16
    assert serve(cache, [*other, 1]) == 0


def test_what_was_useful_once_does_not_stay_for_ever():
    cache = cache_of(blocks=16)
    for _ in range(10):
        serve(cache, text(17, 1))
    for i in range(60):
        serve(cache, text(16, 100 + i))
    assert serve(cache, text(17, 1)) == 0


def test_the_disk_forgets_by_name_when_it_is_full():
    cache = cache_of(blocks=64, disk=10)
    for seed in (1, 2, 3):
        for _ in range(2):
            serve(cache, text(17, seed))
        for t in cache.send(0.0)[0]:
            cache.moves.finish(t.id, True, BYTES, 0.001)
    assert cache.tiers.shelves[Tier.DISK].used <= 10 * BYTES
    assert on(cache, Tier.DISK) == 10
    assert serve(cache, text(17, 3)) == 16


# ---- whose


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST, Tier.DISK])
def test_a_flood_costs_the_flooder_only(tier):
    """K10: B sends ten times its quota; A keeps what is within its own."""
    sizes = {Tier.DEVICE: (64, 0, 0), Tier.HOST: (16, 64, 0), Tier.DISK: (16, 0, 64)}[tier]
    cache = cache_of(*sizes)
    mine = [text(17, seed) for seed in range(7)]  # 28 blocks, of 32 that are its share

    def round_of_a():
        """Tokens of 16 that are in this tier, of each of its prompts."""
        hits = 0
        for tokens in mine:
            table = cache.open(b"A", cache.owner("A"))
            hits += sum(entry.committed(tier) is not None for entry, _ in cache._path(table, tokens))
            for _ in range(2):
                serve(cache, tokens, "A", b"A")
                settle(cache)
        return hits

    round_of_a()
    before = round_of_a()
    for i in range(160):
        tokens = text(17, 1000 + i)
        for _ in range(2):
            serve(cache, tokens, "B", b"B")
            settle(cache)
    assert before == 28
    assert round_of_a() >= before * 0.98


def test_the_weight_and_the_quota_say_what_one_is_entitled_to():
    cache = cache_of(blocks=60)
    cache.owner("heavy", 2.0)
    cache.owner("light", 1.0)
    cache.owner("fixed", 1.0, (30 * BYTES, 0, 0))
    rng = random.Random(1)
    for i in range(400):
        name = rng.choice(["heavy", "light", "fixed"])
        table = cache.open(name.encode(), cache._owners[owner_id(name)])
        tokens = text(8, i)
        cache.grow(table, 8)
        cache.commit(table, tokens, 8)
        cache.release(table)
    shelf = cache.tiers.shelves[Tier.DEVICE]
    held = {n: shelf.of(cache._owners[owner_id(n)]) / BYTES for n in ("heavy", "light", "fixed")}
    assert abs(held["fixed"] - 30) <= 3 and abs(held["heavy"] - 20) <= 3 and abs(held["light"] - 10) <= 3


def test_a_tenant_that_a_sequence_names_stays_itself_when_idle_ones_are_forgotten(monkeypatch):
    monkeypatch.setattr(manager, "_MOST_OWNERS", 8)
    cache = cache_of()
    table = cache.open(b"", cache.owner("open"))
    serve(cache, text(8, 1), "cached")
    cached = cache.owner("cached")
    for i in range(20):
        cache.owner(f"idle {i}")
    assert cache.owner("open") is table.owner
    assert cache.owner("cached") is cached
    assert len(cache._owners) <= 8


def test_unused_space_is_borrowed():
    cache = cache_of(blocks=32)
    cache.owner("away", 100.0)
    serve(cache, text(4, 1), "away")
    for i in range(16):
        serve(cache, text(8, 10 + i), "here")
    shelf = cache.tiers.shelves[Tier.DEVICE]
    assert shelf.of(cache.owner("here")) >= 30 * BYTES


# ---- what is worth loading


def on_host_only(recompute=lambda start, n: None, blocks=32):
    """A prompt of 4 blocks that is on the host and not on the device."""
    cache = cache_of(blocks, host=100, recompute=recompute)
    tokens = text(17, 1)
    serve(cache, tokens)
    settle(cache)
    i = 0
    while cache.match(cache.open(b"", cache.owner("t")), tokens):
        serve(cache, text(16, 100 + i))
        settle(cache)
        i += 1
    return cache, tokens


def test_a_load_that_takes_longer_than_computing_is_not_begun():
    for seconds, loads in ((0.0001, 0), (10.0, 4)):
        cache, tokens = on_host_only(recompute=lambda start, n, s=seconds: s)
        table = cache.open(b"", cache.owner("t"))
        cache.prefetch(table, tokens)
        assert len(cache.send(0.0)[0]) == loads
        assert cache.waits(table, tokens, 0.0, 0.0) == bool(loads)


def test_a_load_is_waited_for_until_it_is_late_and_then_what_came_is_used():
    cache, tokens = on_host_only()
    table = cache.open(b"", cache.owner("t"))
    cache.prefetch(table, tokens)
    transfers, _ = cache.send(0.0)
    assert cache.waits(table, tokens, 0.0, 0.0)
    assert cache.match(table, tokens) == []
    cache.moves.finish(transfers[0].id, True, BYTES, 0.001)
    cache.moves.finish(transfers[2].id, True, BYTES, 0.001)
    late = cache.loads.next_timeout(0.0)
    assert cache.waits(table, tokens, late - 1e-6, 0.0)
    assert not cache.waits(table, tokens, late, 0.0)
    assert cache.loads.next_timeout(late) is None, "or the scheduler would wake up for ever"
    assert len(cache.match(table, tokens)) == 1, "a contiguous beginning"
    cache.attach(table, cache.match(table, tokens))
    cache.moves.finish(transfers[1].id, True, BYTES, 0.001)
    cache.moves.finish(transfers[3].id, False, 0, 0.001)
    cache.release(table)
    settle(cache)
    cache.check([])
    assert cache.used == 0 and cache.loads.held == 0


def test_a_load_waits_for_blocks_that_steps_not_yet_done_may_still_read():
    cache, tokens = on_host_only(blocks=8)
    cache.step_planned(1)
    serve(cache, text(32, 7))  # all blocks, just let go
    table = cache.open(b"", cache.owner("t"))
    cache.prefetch(table, tokens, urgent=True)
    stores = cache.send(0.0)[0]
    assert not any(t.target.tier is Tier.DEVICE for t in stores)
    for store in stores:
        cache.moves.finish(store.id, True, BYTES, 0.001)
    assert cache.waits(table, tokens, 0.0, 0.0), "computing would have to wait for the same blocks"
    cache.step_done(1)
    settle(cache)
    assert not cache.waits(table, tokens, 0.0, 0.0)
    assert len(cache.match(table, tokens)) == 4


def test_a_load_that_fails_is_a_miss_and_is_not_waited_for():
    cache, tokens = on_host_only()
    table = cache.open(b"", cache.owner("t"))
    cache.prefetch(table, tokens)
    for transfer in cache.send(0.0)[0]:
        cache.moves.finish(transfer.id, False, 0, 0.001)
    assert not cache.waits(table, tokens, 0.0, 0.0)
    assert cache.match(table, tokens) == [] and on(cache, Tier.HOST) > 0


def test_loads_take_nothing_that_is_held_and_no_more_than_their_budget():
    cache, tokens = on_host_only()
    hog = cache.open(b"", cache.owner("hog"))
    cache.grow(hog, 31 * SIZE)
    table = cache.open(b"", cache.owner("t"))
    cache.prefetch(table, tokens)
    assert len(cache.send(0.0)[0]) == 1, "one block is to be had"
    cache.release(hog)
    for i in range(50):
        cache.prefetch(cache.open(b"", cache.owner("t")), tokens)
        assert cache.loads.held <= 32 // 4, i


def test_cancelled_prefetches_leak_nothing():
    """K12."""
    cache, tokens = on_host_only(blocks=64)
    rng = random.Random(1)
    open_moves = []
    for i in range(10_000):
        table = cache.open(b"", cache.owner("t"))
        cache.prefetch(table, tokens)
        open_moves += cache.send(float(i))[0]
        if open_moves and rng.random() < 0.5:
            cache.moves.finish(open_moves.pop(0).id, rng.random() < 0.9, BYTES, 0.001)
        cache.loads.drop(table)
        if rng.random() < 0.05:
            serve(cache, tokens)
            serve(cache, text(64, i))
    for transfer in open_moves:
        cache.moves.finish(transfer.id, True, BYTES, 0.001)
    settle(cache)
    cache.check([])
    assert cache.used == 0 and cache.loads.held == 0 and not list(cache.moves.under_way)


def test_a_sick_block_is_nowhere_any_more():
    cache = cache_of(host=50, disk=50)
    tokens = text(17, 1)
    for _ in range(2):
        serve(cache, tokens)
        settle(cache)
    table = cache.open(b"", cache.owner("t"))
    cache.attach(table, cache.match(table, tokens))
    cache.discard(table)
    assert len(cache.send(0.0)[1]) == 4, "the disk is told"
    assert [on(cache, tier) for tier in Tier] == [0, 0, 0]
    cache.check([])


def test_without_the_disk_its_copies_are_gone():
    cache = cache_of(disk=50)
    for _ in range(2):
        serve(cache, text(17, 1))
    settle(cache)
    cache.lose_disk()
    assert on(cache, Tier.DISK) == 0
    serve(cache, text(17, 1))
    assert settle(cache) == 0
    cache.check([])


# ---- who finds what


def test_scopes_fingerprints_and_sizes_share_nothing():
    """K5: no block of one is found by another, from any tier."""
    tokens = text(17, 1)
    names = set()
    caches = [(b"f", SIZE), (b"g", SIZE), (b"f", 2 * SIZE)]
    scopes = [b"", b"a" * 32, b"b" * 32, b"public"]
    for fingerprint, size in caches:
        for scope in scopes:
            cache = KVCache(32, size, fingerprint)
            table = cache.open(scope, cache.owner("t"))
            cache.match(table, tokens)
            assert not names & set(table.chain.keys)
            names |= set(table.chain.keys)


def test_what_is_public_is_found_by_all_and_only_the_public_scope_writes_it():
    cache = cache_of()
    tokens = text(16, 1)
    serve(cache, tokens, "", b"public")
    assert serve(cache, tokens + text(9, 2), "A", b"A" * 32) == 16
    assert serve(cache, tokens + text(9, 2), "A", b"A" * 32) == 24
    assert serve(cache, tokens + text(9, 2), "B", b"B" * 32) == 16
    assert serve(cache, [*tokens, 5, 6], "C", b"public") == 16


def test_what_is_withdrawn_is_found_by_nobody():
    cache = cache_of(host=50, disk=50)
    tokens = text(16, 1)
    for _ in range(2):
        serve(cache, tokens, "", b"public")
        settle(cache)
    assert serve(cache, [*tokens, 1], "A", b"A" * 32) == 16
    settle(cache)
    cache.withdraw(tokens)
    assert serve(cache, [*tokens, 1], "A", b"A" * 32) == 0
    assert len(cache.send(0.0)[1]) == 4, "the disk is told"
    cache.check([])
