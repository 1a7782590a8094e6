import pytest

from ktransformers.kvcache.blocks import BlockTable
from ktransformers.kvcache.hashing import Chain, root_key
from ktransformers.kvcache.manager import KVCache


def filled(cache: KVCache, tokens: list[int], scope: bytes = b"") -> BlockTable:
    """A sequence that hits what it can, computes the rest, and is done with it."""
    table = cache.open(scope)
    cache.attach(table, cache.match(table, tokens))
    cache.grow(table, len(tokens))
    cache.commit(table, tokens, len(tokens))
    return table


def test_the_chain_is_as_documented():
    import hashlib
    import struct

    root = hashlib.sha256(b"kvblk1" + struct.pack("<I", 2) + b"FP" + b"scope").digest()
    assert root_key(b"FP", b"scope") == root
    chain = Chain(root, 2)
    chain.extend([1, 2, 3, 4, 5], 2)
    first = hashlib.sha256(root + struct.pack("<2I", 1, 2)).digest()
    assert chain.keys == [first, hashlib.sha256(first + struct.pack("<2I", 3, 4)).digest()]


def test_fingerprint_and_scope_cannot_be_confused():
    assert root_key(b"ab", b"c") != root_key(b"a", b"bc")


def test_a_hit_leaves_one_token_to_compute():
    cache = KVCache(16, 4, b"f")
    tokens = list(range(16))
    cache.release(filled(cache, tokens))
    for n, blocks in ((16, 3), (17, 4), (4, 0), (5, 1), (1, 0)):
        assert len(cache.match(cache.open(b""), [*tokens, 99][:n])) == blocks


def test_nothing_is_visible_before_commit_and_only_full_blocks_after():
    cache = KVCache(16, 4, b"f")
    tokens = list(range(12))
    table = cache.open(b"")
    cache.grow(table, 12)
    assert cache.match(cache.open(b""), tokens) == []
    cache.commit(table, tokens, 7)
    assert cache.match(cache.open(b""), tokens) == table.blocks[:1]
    cache.commit(table, tokens, 8)
    assert cache.match(cache.open(b""), tokens) == table.blocks[:2]
    cache.check([table])


def test_what_was_not_committed_is_free_after_release():
    cache = KVCache(16, 4, b"f")
    tokens = list(range(12))
    table = cache.open(b"")
    cache.grow(table, 12)
    cache.commit(table, tokens, 5)
    cache.release(table)
    assert (cache.used, cache.cached, cache.available) == (0, 1, 16)
    cache.check([])


def test_scopes_and_fingerprints_never_share():
    cache = KVCache(16, 4, b"f")
    tokens = list(range(9))
    cache.release(filled(cache, tokens, b"one"))
    assert cache.match(cache.open(b"two"), tokens) == []
    assert len(cache.match(cache.open(b"one"), tokens)) == 2


def test_without_reuse_nothing_is_kept():
    cache = KVCache(16, 4, b"f", reuse=False)
    cache.release(filled(cache, list(range(9))))
    assert cache.cached == 0 and cache.match(cache.open(b""), list(range(9))) == []


def test_a_collision_of_names_is_no_hit():
    cache = KVCache(16, 4, b"f")
    tokens = list(range(9))
    cache.release(filled(cache, tokens))
    forged = cache.open(b"")
    cache.match(forged, tokens)
    forged.chain.contents[0] = bytes(16)
    assert cache.match(forged, tokens) == []
    forged = cache.open(b"other")
    genuine = cache.open(b"")
    cache.match(genuine, tokens)
    forged.chain.keys, forged.chain.contents = genuine.chain.keys, genuine.chain.contents
    assert cache.match(forged, tokens) == []


def test_the_same_computed_twice_is_kept_once():
    cache = KVCache(16, 4, b"f")
    tokens = list(range(8))
    a, b = cache.open(b""), cache.open(b"")
    for table in (a, b):
        cache.grow(table, 8)
    cache.commit(a, tokens, 8)
    cache.commit(b, tokens, 8)
    cache.check([a, b])
    cache.release(a)
    cache.release(b)
    assert (cache.cached, cache.available) == (2, 16)
    cache.check([])


def test_the_end_of_the_least_recent_sequence_is_evicted_first():
    cache = KVCache(8, 4, b"f")
    old, new = list(range(100, 117)), list(range(200, 213))
    cache.release(filled(cache, old[:16]))
    cache.release(filled(cache, new[:12]))
    table = cache.open(b"")
    cache.grow(table, 4 * 4)
    assert len(cache.match(cache.open(b""), old)) == 1
    assert len(cache.match(cache.open(b""), new)) == 3
    cache.check([table])


def test_a_shared_block_outlives_its_first_owner():
    cache = KVCache(8, 4, b"f")
    tokens = list(range(9))
    a = filled(cache, tokens)
    b = cache.open(b"")
    cache.attach(b, cache.match(b, tokens))
    cache.release(a)
    assert cache.used == 2
    hog = cache.open(b"")
    assert cache.available == 6
    cache.grow(hog, 24)
    with pytest.raises(ValueError, match="available"):
        cache.grow(hog, 25)
    cache.check([b, hog])
    cache.release(b)
    assert len(cache.match(cache.open(b""), tokens)) == 2


def test_discarded_blocks_are_found_by_nobody():
    cache = KVCache(8, 4, b"f")
    tokens = list(range(9))
    a = filled(cache, tokens)
    b = cache.open(b"")
    cache.attach(b, cache.match(b, tokens))
    cache.discard(a)
    assert cache.match(cache.open(b""), tokens) == []
    cache.check([b])
    cache.release(b)
    cache.check([])
    assert cache.cached == 0


def test_releasing_twice_is_harmless_and_dropping_too_often_is_not():
    cache = KVCache(8, 4, b"f")
    table = filled(cache, list(range(9)))
    blocks = list(table.blocks)
    cache.release(table)
    cache.release(table)
    cache.check([])
    table.blocks = blocks
    with pytest.raises(ValueError, match="dropped"):
        cache.release(table)
