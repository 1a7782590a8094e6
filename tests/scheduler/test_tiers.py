"""The scheduler with a host pool and a disk, against an engine that sees every byte out of place."""

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
    assert len(w.disk) == 14
    w.kill_engine()
    w.start_engine()
    assert served_again(w, tokens, "third") == 56
    w.check_drained()
