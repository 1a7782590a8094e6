"""The disk store where nothing goes wrong: what it keeps, how much, and for whom."""

import dataclasses
import os
import threading

import pytest

from ktransformers.kvcache.stores import appender
from ktransformers.kvcache.stores.disk import DiskStore
from ktransformers.kvcache.stores.store import StoreError


@pytest.fixture
def store(stored, tmp_path):
    store = stored.open_store(tmp_path / "kv")
    yield store
    store.close()


def test_what_was_put_is_found_by_its_whole_name(stored, store) -> None:
    block = stored.name(1)
    assert not stored.has(store, block)
    stored.put(store, block)
    assert stored.has(store, block)
    for field in ("parent", "owner", "content"):
        other = dataclasses.replace(block, **{field: bytes(len(getattr(block, field)))})
        assert not stored.has(store, other), field
    assert not stored.has(store, dataclasses.replace(block, content=block.content + b"more"))
    # A caller that asks for something else is no reason to distrust the medium.
    assert store.stats().mismatches == 4 and store.stats().quarantined == 0
    assert stored.has(store, block)
    assert store.lost() == []


def test_a_block_is_written_once(stored, store) -> None:
    block = stored.name(1)
    first = store.put(block, stored.payload(block))
    assert store.put(block, stored.payload(block)) == first > stored.SIZE
    assert store.stats().live_bytes == first


def test_another_block_of_the_same_key_is_not_stored(stored, store) -> None:
    block = stored.name(1)
    stored.put(store, block)
    for other in (dataclasses.replace(block, owner=bytes(16)), dataclasses.replace(block, parent=bytes(32))):
        assert store.put(other, bytes(stored.SIZE)) == 0
    assert stored.has(store, block)


def test_reopened_it_has_the_same_blocks_hits_and_owners(stored, tmp_path) -> None:
    store = stored.open_store(tmp_path / "kv")
    blocks = [stored.name(i, owner=i % 3) for i in range(40)]
    stored.put(store, *blocks)
    assert stored.has(store, blocks[5])  # its segment is sealed: 9 records to a segment
    assert stored.has(store, blocks[39])
    store.forget([blocks[7].key, b"unknown" * 4])
    before, stats = store.entries(), store.stats()
    store.close()
    again = stored.open_store(tmp_path / "kv")
    assert again.entries() == before
    assert [e.hits for e in before] == [int(i in (5, 38)) for i in range(39)]
    assert again.stats().owner_bytes == stats.owner_bytes
    assert sum(stats.owner_bytes.values()) == stats.live_bytes == 39 * before[0].size
    for i, block in enumerate(blocks):
        assert stored.has(again, block) == (i != 7)
    again.close()


def test_a_closed_store_has_nothing_and_takes_nothing(stored, tmp_path) -> None:
    store = stored.open_store(tmp_path / "kv")
    stored.put(store, stored.name(1))
    store.close()
    store.close()
    assert not stored.has(store, stored.name(1))
    assert store.put(stored.name(2), stored.payload(stored.name(2))) == 0
    store.forget([stored.name(1).key])
    store.flush()


def test_wrong_sizes_are_the_callers_fault(stored, store) -> None:
    block = stored.name(1)
    for wrong in (
        dataclasses.replace(block, key=b"short"),
        dataclasses.replace(block, parent=b""),
        dataclasses.replace(block, owner=bytes(17)),
    ):
        with pytest.raises(ValueError, match="a block of"):
            store.put(wrong, stored.payload(block))
    with pytest.raises(ValueError, match="a block of"):
        store.put(block, stored.payload(block)[1:])
    with pytest.raises(ValueError, match="a block of"):
        store.get_into(block, bytearray(stored.SIZE + 1))


def test_names_of_several_lengths(stored, tmp_path) -> None:
    """Heads take whole pages: two for the names of blocks of 1,024 tokens."""
    store = stored.open_store(tmp_path / "kv")
    blocks = [stored.name(i, content_bytes=[64, 4096, 0][i % 3]) for i in range(9)]
    stored.put(store, *blocks)
    store.close()
    store = stored.open_store(tmp_path / "kv")
    assert all(stored.has(store, block) for block in blocks)
    store.close()


@pytest.mark.parametrize("left", ["all", "no index", "an open segment"])
def test_opening_reads_no_blocks(stored, tmp_path, monkeypatch, left) -> None:
    """Its time does not grow with the bytes: of a segment it reads head and footer at most."""
    store = stored.open_store(tmp_path / "kv")
    stored.put(store, *map(stored.name, range(47)))
    if left == "an open segment":
        stored.crash(store)
    else:
        store.close()
    if left == "no index":
        (tmp_path / "kv/index.sqlite").unlink()
    files = len(stored.segments(tmp_path / "kv"))
    reads: list[int] = []
    for call in ("pread", "preadv"):
        real = getattr(os, call)

        def counted(*args, real=real):
            reads.append(1)
            return real(*args)

        monkeypatch.setattr(os, call, counted)
    store = stored.open_store(tmp_path / "kv")
    # Of each segment the head, of the open one what may be a trailer and its two records in two reads each.
    assert len(reads) <= {"all": files, "no index": 3 * files, "an open segment": files + 1 + 2 * 2}[left]
    monkeypatch.undo()
    assert len(store.entries()) == 47
    store.close()


# ---- space


def test_the_cap_is_kept_and_what_is_dropped_is_told(stored, tmp_path) -> None:
    cap = 1 << 20
    store = stored.open_store(tmp_path / "kv", cap=cap)
    blocks = [stored.name(i) for i in range(300)]
    told: set[bytes] = set()
    for block in blocks:
        stored.put(store, block)
        told.update(store.lost())
        taken = sum(path.stat().st_size for path in stored.segments(tmp_path / "kv"))
        assert taken == store.stats().total_bytes <= cap
    kept = {entry.key for entry in store.entries()}
    assert kept | told == {block.key for block in blocks} and not kept & told
    assert all(stored.has(store, block) == (block.key in kept) for block in blocks)
    assert len(kept) > 0.7 * cap // store.entries()[0].size
    store.close()


def test_blocks_that_are_read_outlive_those_that_are_not(stored, tmp_path) -> None:
    """The only block of its segment that anybody reads is carried over when the segment goes."""
    store = stored.open_store(tmp_path / "kv", cap=4 << 20)
    loved = stored.name(-1)
    stored.put(store, loved)
    for i in range(1500):
        if i % 50 == 0:
            assert stored.has(store, loved), i
        stored.put(store, stored.name(i))
    assert stored.has(store, loved) and loved.key not in store.lost()
    assert store.stats().reclaimed > 20
    store.close()


def test_a_segment_of_dead_blocks_goes_first(stored, tmp_path) -> None:
    store = stored.open_store(tmp_path / "kv")
    blocks = [stored.name(i) for i in range(63)]  # seven segments of nine records; eight would fit
    stored.put(store, *blocks)
    dead, last = blocks[18:26], blocks[26]
    store.forget([block.key for block in dead])
    assert store.lost() == []  # what was forgotten is not lost
    stored.put(store, *map(stored.name, range(100, 117)))
    assert store.stats().reclaimed == 1
    assert store.lost() == [] and stored.has(store, last)  # a tenth of a segment is written again
    assert len(store.entries()) == 63 - 8 + 17
    store.close()


def test_what_is_new_is_spared_until_somebody_could_have_read_it(stored, tmp_path) -> None:
    store = stored.open_store(tmp_path / "kv")
    stored.put(store, *map(stored.name, range(63)))
    for _ in range(3):
        assert all(stored.has(store, stored.name(i)) for i in range(63))
    for first in range(100, 400, 9):
        stored.put(store, *map(stored.name, range(first, first + 9)))
        store.put(
            stored.name(1000 + first), stored.payload(stored.name(1000 + first))
        )  # the next segment begins
        assert all(stored.name(i).key in store._books.catalog.blocks for i in range(first, first + 8))
    store.close()


def test_however_much_goes_at_once_little_of_it_is_carried_over(stored, tmp_path, monkeypatch) -> None:
    """It is held in memory meanwhile."""
    store = stored.open_store(tmp_path / "kv")
    stored.put(store, *map(stored.name, range(63)))
    read = [stored.name(i) for i in range(0, 63, 9)]  # one of each segment
    assert all(stored.has(store, name) for name in read)
    total = store.stats().total_bytes
    folder = store._books.folder
    monkeypatch.setattr(
        folder, "free_bytes", lambda: (0 if store.stats().total_bytes > total / 2 else 1 << 40, 1 << 41)
    )
    stored.put(store, stored.name(100))
    assert store.stats().reclaimed == 4
    kept = [name for name in read if stored.has(store, name)]
    assert len(kept) == 7 - 4 + 1 and len(store.lost()) == 4 * 9 - 1
    store.close()


def test_what_is_forgotten_while_it_is_carried_over_stays_forgotten(stored, tmp_path, monkeypatch) -> None:
    store = stored.open_store(tmp_path / "kv")
    stored.put(store, *map(stored.name, range(63)))
    store.forget([stored.name(i).key for i in range(18, 26)])
    real = appender.create

    def create(*args):
        if store.stats().reclaimed:  # its segment is gone, and the next one is not there yet
            assert not stored.has(store, stored.name(26))
            store.forget([stored.name(26).key])
        return real(*args)

    monkeypatch.setattr(appender, "create", create)
    stored.put(store, *map(stored.name, range(100, 117)))
    assert store.stats().reclaimed == 1 and not stored.has(store, stored.name(26))
    assert store.lost() == [] and len(store.entries()) == 63 - 9 + 17
    store.close()


def test_a_segment_that_holds_nothing_is_deleted_with_the_next_flush(stored, tmp_path) -> None:
    store = stored.open_store(tmp_path / "kv")
    blocks = [stored.name(i) for i in range(60)]
    stored.put(store, *blocks)
    before = len(stored.segments(tmp_path / "kv"))
    store.forget([block.key for block in blocks])
    assert len(stored.segments(tmp_path / "kv")) == before  # forget is called where nobody may wait
    store.flush()
    assert before > 3 and len(stored.segments(tmp_path / "kv")) == 1  # the open one
    store.close()
    assert stored.segments(tmp_path / "kv") == []


def test_a_lower_cap_shrinks_the_folder(stored, tmp_path) -> None:
    store = stored.open_store(tmp_path / "kv")
    stored.put(store, *map(stored.name, range(60)))
    store.close()
    store = stored.open_store(tmp_path / "kv", cap=1 << 19)
    assert store.stats().total_bytes <= 1 << 19 and store.entries()
    assert store.lost() == []  # of what was there before nobody knows
    store.close()


def test_a_cap_that_holds_nothing_is_refused(stored, tmp_path) -> None:
    with pytest.raises(StoreError, match="hold no two blocks"):
        stored.open_store(tmp_path / "kv", cap=5000)
    assert not (tmp_path / "kv").exists()


def test_the_reserve_is_kept(stored, tmp_path, monkeypatch, reserve) -> None:
    store = stored.open_store(tmp_path / "kv")
    stored.put(store, *map(stored.name, range(30)))
    have = len(store.entries())
    monkeypatch.setattr(store._books.folder, "free_bytes", lambda: (100 << 20, 100 << 30))
    for i in range(100, 160):
        store.put(stored.name(i), stored.payload(stored.name(i)))
    stats = store.stats()
    assert stats.state == "read-only" and "for others" in stats.reason
    assert stats.refused_puts > 0 and stats.blocks < have
    store.close()


@pytest.mark.parametrize(
    ("size", "left"),
    [(64 << 20, 6.4 * 2**20), (10 << 30, 2**30), (40 << 30, 2 << 30), (1 << 40, 0.05 * 2**40)],
)
def test_reserve(size, left, reserve) -> None:
    assert appender.reserve(size) == pytest.approx(left, abs=1)


def test_segments_have_whole_records_and_sane_sizes() -> None:
    stride = 368640 + 4096
    for cap, least, most in (
        (64 << 30, 255 << 20, 256 << 20),
        (8 << 30, 127 << 20, 128 << 20),
        (32 << 20, 3 << 20, 4 << 20),
    ):
        assert least <= appender.slots(cap, stride) * stride <= most
    assert appender.slots(1 << 20, stride) == 1


# ---- several models in one folder


def test_models_share_a_folder_and_see_only_their_own(stored, tmp_path) -> None:
    block = stored.name(1)
    for model in (b"a" * 32, b"b" * 32):
        store = stored.open_store(tmp_path / "kv", model)
        assert not stored.has(store, block)
        stored.put(store, block)
        store.close()
    for model in (b"a" * 32, b"b" * 32):
        store = stored.open_store(tmp_path / "kv", model)
        assert stored.has(store, block)
        store.close()
    store = stored.open_store(tmp_path / "kv", b"a" * 32, size=stored.SIZE - 1)
    assert not store.entries()  # whatever a fingerprint says, other sizes are other blocks
    store.close()


def test_other_models_blocks_go_first_the_one_unused_for_longest_before(stored, tmp_path) -> None:
    for model in (b"a" * 32, b"b" * 32, b"c" * 32, b"a" * 32):
        store = stored.open_store(tmp_path / "kv", model)
        stored.put(store, *(stored.name(i + model[0] * 100) for i in range(14)))
        store.close()

    def blocks(model: bytes) -> int:
        store = stored.open_store(tmp_path / "kv", model)
        found = len(store.entries())
        store.close()
        return found

    store = stored.open_store(tmp_path / "kv", b"d" * 32)
    stored.put(store, *map(stored.name, range(45)))
    assert store.lost() == [] and len(store.entries()) == 45
    store.close()
    assert blocks(b"b" * 32) < 14
    assert blocks(b"c" * 32) == blocks(b"a" * 32) == 14


# ---- the folder


def test_two_stores_on_one_folder(stored, store, tmp_path) -> None:
    """K8: the second is told who has it, and harms nothing."""
    stored.put(store, stored.name(1))
    with pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
        stored.open_store(tmp_path / "kv")
    assert stored.has(store, stored.name(1))
    store.close()
    again = stored.open_store(tmp_path / "kv")
    assert stored.has(again, stored.name(1))
    again.close()


def test_files_are_private(stored, store, tmp_path) -> None:
    stored.put(store, *map(stored.name, range(30)))
    store.flush()
    for path in [tmp_path / "kv", *(tmp_path / "kv").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_a_readable_folder_is_made_private(stored, tmp_path) -> None:
    (tmp_path / "kv").mkdir(mode=0o755)
    stored.open_store(tmp_path / "kv").close()
    assert (tmp_path / "kv").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_folder_that_others_can_write_is_refused(stored, tmp_path, mode) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv").chmod(mode)
    with pytest.raises(StoreError, match="can be written by others"):
        stored.open_store(tmp_path / "kv")
    assert list((tmp_path / "kv").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_somebody_elses_folder_is_refused(stored, tmp_path) -> None:
    (tmp_path / "kv").mkdir(mode=0o700)
    os.chown(tmp_path / "kv", 12345, 12345)
    with pytest.raises(StoreError, match="another user"):
        stored.open_store(tmp_path / "kv")


def test_links_are_not_followed(stored, tmp_path) -> None:
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (tmp_path / "kv").symlink_to(real)
    with pytest.raises(StoreError, match="kv is a link"):
        stored.open_store(tmp_path / "kv")
    assert list(real.iterdir()) == []
    for planted in ("LOCK", "META.json.new", "seg", "index.sqlite"):
        folder, victim = tmp_path / f"with-{planted}", tmp_path / "victim"
        folder.mkdir(mode=0o700)
        victim.write_text("precious")
        (folder / planted).symlink_to(victim)
        with pytest.raises(StoreError):
            stored.open_store(folder)
        assert victim.read_text() == "precious"


def test_a_folder_of_other_things_is_refused(stored, tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    tmp_path.chmod(0o700)
    with pytest.raises(StoreError, match=r"holds other things \(thesis.tex\)"):
        stored.open_store(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_later_format_is_refused_untouched(stored, tmp_path) -> None:
    store = stored.open_store(tmp_path / "kv")
    stored.put(store, stored.name(1))
    store.close()
    (tmp_path / "kv/META.json").write_text('{"format": 2}')
    with pytest.raises(StoreError, match="has format 2, this version knows 1"):
        stored.open_store(tmp_path / "kv")
    (tmp_path / "kv/META.json").write_text("{")
    store = stored.open_store(tmp_path / "kv")
    assert stored.has(store, stored.name(1))
    store.close()


# ---- threads


def test_threads_that_put_get_and_forget_while_space_runs_out(stored, tmp_path) -> None:
    store: DiskStore = stored.open_store(tmp_path / "kv", cap=1 << 19)
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(400):
                i = number * 50 + step * 7 % 173
                store.put(stored.name(i), stored.payload(stored.name(i)))
                stored.has(store, stored.name(i - 3))
                if step % 11 == 0:
                    store.forget([stored.name(i - 5).key])
                if step % 50 == number:
                    store.flush()
                    store.lost()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    stats = store.stats()
    assert stats.state == "on" and stats.mismatches == 0 and stats.reclaimed > 0
    assert sum(e.size for e in store.entries()) == stats.live_bytes == sum(stats.owner_bytes.values())
    before = store.entries()
    store.close()
    again = stored.open_store(tmp_path / "kv", cap=1 << 19)
    assert again.entries() == before
    again.close()


def test_closing_waits_for_the_calls_under_way(stored, tmp_path) -> None:
    """And no call that comes later touches a file: its number could be somebody else's by then."""
    wrong: list[BaseException] = []
    for turn in range(15):
        store = stored.open_store(tmp_path / "kv", cap=1 << 19)
        started = threading.Barrier(4)

        def work(number: int, store=store, started=started) -> None:
            try:
                started.wait()
                for i in range(40):
                    store.put(stored.name(i), stored.payload(stored.name(i)))
                    stored.has(store, stored.name(i * number % 40))
                    store.forget([stored.name(i - 9).key])
                    store.flush()
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        started.wait()
        for _ in range(turn):
            store.stats()
        store.close()
        for thread in threads:
            thread.join()
        assert not wrong and store.stats().io_errors == 0
