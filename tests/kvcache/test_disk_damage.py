"""K4: whatever is wrong with the files, it is a miss: never a wrong byte, never an exception."""

import os
import random
import sqlite3
from pathlib import Path

import pytest

from ktransformers.kvcache.stores.layout import (
    PAGE,
    Row,
    SegmentHead,
    footer,
    parse_footer,
    parse_record,
    record_head,
    rows_listed,
)

RECORD = 3 * PAGE  # a head, and 5,000 bytes in two pages


@pytest.fixture
def folder(stored, tmp_path) -> Path:
    """Five segments of nine records each."""
    store = stored.open_store(tmp_path / "kv")
    stored.put(store, *map(stored.name, range(45)))
    store.close()
    return tmp_path / "kv"


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    return random.Random(seed)


def found(stored, folder: Path, model: bytes | None = None) -> list[int]:
    """Which of the blocks are there (each byte is checked). The store works on, and opens the same again."""
    counts = []
    for _ in range(2):
        store = stored.open_store(folder, model or stored.MODEL)
        counts.append([i for i in range(45) if stored.has(store, stored.name(i))])
        stored.put(store, stored.name(99))
        assert stored.has(store, stored.name(99))
        store.forget([stored.name(99).key])
        store.close()
    assert set(counts[0]) >= set(counts[1])
    return counts[0]


def without(*segments: int) -> list[int]:
    return [i for i in range(45) if i // 9 not in segments]


# ---- heads


def test_every_byte_of_a_segments_head_counts(rng) -> None:
    head = SegmentHead(7, bytes(range(16)), b"f" * 32, 64, 5000, 9)
    page = head.pack()
    assert SegmentHead.parse(page) == head
    for byte in range(PAGE):
        damaged = bytearray(page)
        damaged[byte] ^= 1 << rng.randrange(8)
        assert SegmentHead.parse(bytes(damaged)) is None, byte
    assert SegmentHead.parse(page[:-1]) is None and SegmentHead.parse(b"") is None


def test_a_damaged_segment_head_costs_its_segment_alone(stored, folder, rng) -> None:
    for number, segment in enumerate(stored.segments(folder)[:3]):
        stored.flip(segment, rng.randrange(PAGE), rng.randrange(8))
        assert found(stored, folder) == without(*range(number + 1))
        assert not segment.exists()


def test_every_byte_of_a_records_head_counts(stored, rng) -> None:
    head = SegmentHead(7, bytes(range(16)), b"f" * 32, 64, 5000, 9)
    name, payload_sum = stored.name(1), bytes(16)
    page = record_head(head, PAGE, name, payload_sum)
    parsed = parse_record(head, PAGE, page)
    assert parsed is not None and parsed[0].content == name.content and parsed[1] == payload_sum
    for byte in range(PAGE):
        damaged = bytearray(page)
        damaged[byte] ^= 1 << rng.randrange(8)
        assert parse_record(head, PAGE, damaged) is None, byte
    assert parse_record(head, PAGE + RECORD, page) is None  # the right record in the wrong place


def test_every_byte_of_a_footer_counts(stored, rng) -> None:
    head = SegmentHead(7, bytes(range(16)), b"f" * 32, 64, 5000, 9)
    names = [stored.name(i) for i in range(9)]
    rows = [Row(head.offset(i), name.key, name.parent, name.owner) for i, name in enumerate(names)]
    data = footer(head, rows)
    assert rows_listed(head, data[-PAGE:]) == 9 and parse_footer(head, data, 9) == rows
    for byte in range(len(data)):
        damaged = bytearray(data)
        damaged[byte] ^= 1 << rng.randrange(8)
        count = rows_listed(head, bytes(damaged[-PAGE:]))
        assert count is None or parse_footer(head, bytes(damaged), count) is None, byte


# ---- payloads


def test_ten_thousand_bits_of_records(stored, in_memory, rng) -> None:
    """Each is a miss that takes its segment out; the store goes on."""
    store = stored.open_store(in_memory / "kv")
    for n in range(10_000):
        name = stored.name(n % 50)
        stored.put(store, name)
        (segment,) = (path for path in stored.segments(in_memory / "kv") if path.suffix == ".kvs")
        where = rng.randrange(PAGE + stored.SIZE)
        stored.flip(segment, PAGE + where, rng.randrange(8))
        assert not stored.has(store, name), (n, where)
        assert store.lost() == [name.key]
        assert store.stats().quarantined == store.stats().mismatches == n + 1
    assert store.stats().state == "on" and store.stats().total_bytes <= 1 << 20
    store.close()


def test_bits_of_closed_segments(stored, folder, rng) -> None:
    for number, segment in enumerate(stored.segments(folder)):
        record = rng.randrange(9)
        stored.flip(segment, PAGE + record * RECORD + rng.randrange(PAGE + stored.SIZE), rng.randrange(8))
        store = stored.open_store(folder)
        assert not stored.has(store, stored.name(number * 9 + record))
        assert {e.key for e in store.entries()} == {stored.name(i).key for i in without(*range(number + 1))}
        store.close()
        assert found(stored, folder) == without(*range(number + 1))


def test_the_padding_means_nothing(stored, folder) -> None:
    stored.flip(stored.segments(folder)[0], PAGE + PAGE + stored.SIZE, 0)
    assert found(stored, folder) == without()


# ---- files


def test_a_record_that_was_not_whole_when_the_store_crashed(stored, tmp_path, rng) -> None:
    """It is not found again, and its neighbours are."""
    store = stored.open_store(tmp_path / "kv")
    stored.put(store, *map(stored.name, range(5)))
    stored.crash(store)
    stored.flip(stored.segments(tmp_path / "kv")[0], PAGE + RECORD + PAGE + rng.randrange(stored.SIZE), 1)
    store = stored.open_store(tmp_path / "kv")
    assert [stored.has(store, stored.name(i)) for i in range(5)] == [True, False, True, True, True]
    assert store.stats().quarantined == store.stats().mismatches == 0
    store.close()


def test_truncated_tails(stored, folder, rng) -> None:
    size = stored.segments(folder)[2].stat().st_size
    for left in sorted((rng.randrange(size) for _ in range(20)), reverse=True):
        os.truncate(stored.segments(folder)[2], left)
        # Whole records in front of the cut may be found until one behind it is asked for.
        there = found(stored, folder)
        assert set(without(2)) <= set(there)
        if not stored.segments(folder)[2:] or stored.segments(folder)[2].stat().st_size > left:
            break


def test_what_was_cut_off_is_not_listed(stored, folder) -> None:
    """Though the index has it: its neighbours need not go with it."""
    os.truncate(stored.segments(folder)[2], PAGE + 3 * RECORD + 5)
    store = stored.open_store(folder)
    there = [i for i in range(45) if stored.name(i).key in {entry.key for entry in store.entries()}]
    assert there == [i for i in range(45) if i // 9 != 2 or i < 21]
    assert all(stored.has(store, stored.name(i)) for i in there)
    store.close()


@pytest.mark.parametrize("index", [True, False])
def test_zero_filled_tails(stored, folder, rng, index) -> None:
    """What a filesystem may leave of a file after a power cut."""
    segment = stored.segments(folder)[4]
    size, left = segment.stat().st_size, PAGE + rng.randrange(9 * RECORD)
    os.truncate(segment, left)
    os.truncate(segment, size)
    if not index:
        (folder / "index.sqlite").unlink()
    whole = (left - PAGE) // RECORD
    there = found(stored, folder)
    assert set(there) >= set(without(4))
    if not index:
        # Block 36 + whole is whole by chance if only its padding was cut.
        assert set(there) - set(without(4)) >= set(range(36, 36 + whole))


def test_segments_that_were_swapped(stored, folder) -> None:
    one, two = stored.segments(folder)[:2]
    one.rename(folder / "seg/tmp")
    two.rename(one)
    (folder / "seg/tmp").rename(two)
    assert found(stored, folder) == without(0, 1)


def test_segments_that_were_swapped_while_running(stored, folder) -> None:
    store = stored.open_store(folder)
    one, two = stored.segments(folder)[:2]
    one.rename(folder / "seg/tmp")
    two.rename(one)
    (folder / "seg/tmp").rename(two)
    assert not any(stored.has(store, stored.name(i)) for i in range(18))
    assert all(stored.has(store, stored.name(i)) for i in range(18, 45))
    assert store.stats().quarantined == 2
    store.close()


def test_a_segment_of_another_folder(stored, folder, tmp_path) -> None:
    """The same model and file name, with other blocks in it."""
    other = stored.open_store(tmp_path / "other")
    stored.put(other, *map(stored.name, range(200, 209)))
    other.close()
    stored.segments(tmp_path / "other")[0].replace(stored.segments(folder)[0])
    assert found(stored, folder) == without(0)
    store = stored.open_store(folder)
    assert stored.has(store, stored.name(205))  # they are good blocks of this model
    store.close()


def test_things_that_are_no_segments(stored, folder) -> None:
    names = "0000000001.kvs", "0000000002.kvs", "0000000003.kvs"
    for name in names:
        (folder / "seg" / name).unlink()
    os.mkfifo(folder / "seg" / names[0])
    (folder / "seg" / names[1]).mkdir()
    (folder / "seg" / names[2]).symlink_to("/etc/passwd")
    for name in ("notes.txt", "7.kvs", "x.kvs", "٣.kvs"):
        (folder / "seg" / name).write_text("?")
    assert found(stored, folder) == without(0, 1, 2)
    assert (folder / "seg/notes.txt").exists()


# ---- the index


def test_the_index_of_another_model(stored, folder, tmp_path) -> None:
    other = stored.open_store(tmp_path / "other", b"o" * 32)
    stored.put(other, *map(stored.name, range(45)))
    other.close()
    (tmp_path / "other/index.sqlite").replace(folder / "index.sqlite")
    assert found(stored, folder) == without()  # by the footers
    assert found(stored, folder, b"o" * 32) == []


@pytest.mark.parametrize("left", ["nothing", "an empty file", "half", "garbage", "another database"])
def test_a_lost_index_is_made_anew(stored, folder, left) -> None:
    index = folder / "index.sqlite"
    data = index.read_bytes()
    index.unlink()
    if left == "another database":
        db = sqlite3.connect(index)
        db.execute("CREATE TABLE t (x)")
        db.close()
        index.chmod(0o600)
    elif left != "nothing":
        index.write_bytes(
            {"an empty file": b"", "half": data[: len(data) // 2], "garbage": b"?" * 9000}[left]
        )
    assert found(stored, folder) == without()


def test_bits_of_the_index(stored, folder, rng) -> None:
    """SQLite does not check its pages' bytes: what a flipped bit says is compared with the record, too."""
    index = folder / "index.sqlite"
    data = index.read_bytes()
    files = {path: path.read_bytes() for path in stored.segments(folder)}
    missing = 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.choice([1, 1, 8, 64])):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        index.write_bytes(damaged)
        store = stored.open_store(folder)
        missing += sum(not stored.has(store, stored.name(i)) for i in range(45))
        store.close()
        for path, content in files.items():
            if not path.exists() or path.stat().st_size != len(content):
                path.write_bytes(content)
    assert missing < 150 * 45 / 2


def test_an_index_that_points_elsewhere(stored, folder) -> None:
    db = sqlite3.connect(folder / "index.sqlite")
    db.execute("UPDATE block SET offset = offset + ? WHERE segment = 1 AND offset = ?", (RECORD * 20, PAGE))
    db.execute("UPDATE block SET offset = offset + 1 WHERE segment = 2 AND offset = ?", (PAGE,))
    db.execute("UPDATE block SET key = ? WHERE segment = 3 AND offset = ?", (stored.name(99).key, PAGE))
    db.commit()
    db.close()
    store = stored.open_store(folder)
    assert not stored.has(store, stored.name(0)) and not stored.has(store, stored.name(9))
    assert stored.has(store, stored.name(1)) and stored.has(store, stored.name(10))
    assert not stored.has(store, stored.name(99))
    assert store.stats().quarantined == 1
    store.close()
