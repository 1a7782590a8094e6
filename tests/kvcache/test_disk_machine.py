"""K1, the disk's part: random calls, crashes, damage and reopenings of a store against sets of numbers.

DISK_STEPS sets how many steps a run has, about (of itself a few thousand; `make nightly` takes 10^6).
"""

import os

import hypothesis.strategies as st
import stored_blocks
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

STEPS = int(os.environ.get("DISK_STEPS", "4000"))
PER_RUN = 80
BLOCKS = st.integers(0, 60)
MODELS = [b"a" * 32, b"b" * 32]


class DiskMachine(RuleBasedStateMachine):
    """What is known of each block of each model:

        kept        put or seen, and not lost since: it must be found
        forgotten   if the store crashes now, it may be found again
    else it must not be found. Of a model that was not open for a while, all that was ever put may be there.
    """

    @initialize(cap=st.sampled_from([150_000, 400_000, 1 << 20]))
    def start(self, cap: int) -> None:
        self.blocks = stored_blocks
        self.cap = cap
        self.memory = self.blocks.in_memory()
        self.folder = self.memory.__enter__() / "kv"
        self.model = 0
        self.ever: list[set[int]] = [set(), set()]
        self.kept: set[int] = set()
        self.forgotten: set[int] = set()
        self.number = {self.blocks.name(i).key: i for i in range(100)}
        self.store = self.open()

    def open(self):
        return self.blocks.open_store(self.folder, MODELS[self.model], cap=self.cap)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.memory.__exit__(None, None, None)

    def settle(self) -> None:
        """Take note of what was lost."""
        for key in self.store.lost():
            i = self.number[key]
            assert i in self.kept, f"{i} is lost, but was not there"
            self.kept.discard(i)

    @rule(first=BLOCKS, count=st.integers(1, 12))
    def put(self, first: int, count: int) -> None:
        for i in range(first, first + count):
            stored = self.store.put(
                self.blocks.name(i, owner=i % 4), self.blocks.payload(self.blocks.name(i))
            )
            self.settle()
            assert stored, self.store.stats()
            self.kept.add(i)
            self.forgotten.discard(i)
            self.ever[self.model].add(i)

    @rule(i=BLOCKS)
    def get(self, i: int) -> None:
        assert self.blocks.has(self.store, self.blocks.name(i, owner=i % 4)) == (i in self.kept)

    @rule(i=BLOCKS)
    def get_as_another(self, i: int) -> None:
        assert not self.blocks.has(self.store, self.blocks.name(i, owner=9))
        assert not self.blocks.has(self.store, self.blocks.name(i, owner=i % 4, content_bytes=60))

    @rule(first=BLOCKS, count=st.integers(1, 20))
    def forget(self, first: int, count: int) -> None:
        gone = range(first, first + count)
        self.store.forget([self.blocks.name(i).key for i in gone])
        self.forgotten |= self.kept & set(gone)
        self.kept -= set(gone)

    @rule()
    def flush(self) -> None:
        self.store.flush()

    def reopened(self, crashed: bool) -> None:
        self.store = self.open()
        self.settle()
        there = {self.number[entry.key] for entry in self.store.entries()}
        assert self.kept <= there, self.kept - there
        assert there - self.kept <= (self.forgotten if crashed else set())
        self.kept = there
        self.forgotten -= there

    @rule()
    def close(self) -> None:
        self.store.close()
        self.reopened(crashed=False)
        self.forgotten.clear()

    @rule()
    def crash(self) -> None:
        self.blocks.crash(self.store)
        self.reopened(crashed=True)

    @rule()
    def crash_without_index(self) -> None:
        self.blocks.crash(self.store)
        for path in self.folder.glob("index.sqlite*"):
            path.unlink()
        self.forgotten = self.ever[self.model] - self.kept  # whatever still lies in a segment
        self.reopened(crashed=True)

    @rule()
    def switch(self) -> None:
        self.store.close()
        self.model = 1 - self.model
        self.store = self.open()
        self.store.lost()
        there = {self.number[entry.key] for entry in self.store.entries()}
        assert there <= self.ever[self.model]
        self.kept, self.forgotten = there, set()

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        """A bit of a record: the block's whole segment is lost, and nothing else."""
        i = data.draw(st.sampled_from(sorted(self.kept)))
        block = self.store._books.catalog.blocks[self.blocks.name(i).key]
        beside = {self.number[b.row.key] for b in block.segment.blocks.values()}
        where = data.draw(st.integers(0, 4096 + self.blocks.SIZE - 1))
        path = self.folder / "seg" / f"{block.segment.head.seq:010d}.kvs"
        self.blocks.flip(path, block.row.offset + where, data.draw(st.integers(0, 7)))
        assert not self.blocks.has(self.store, self.blocks.name(i, owner=i % 4))
        assert {self.number[key] for key in self.store.lost()} == beside
        self.kept -= beside

    @invariant()
    def accounts(self) -> None:
        if not hasattr(self, "store"):
            return
        self.settle()
        entries, stats = self.store.entries(), self.store.stats()
        assert {self.number[entry.key] for entry in entries} == self.kept
        assert sum(entry.size for entry in entries) == stats.live_bytes == sum(stats.owner_bytes.values())
        files = sum(path.stat().st_size for path in (self.folder / "seg").iterdir())
        assert files == stats.total_bytes <= self.cap
        assert stats.state == "on" and stats.io_errors == 0


def test_the_store_against_a_dict(stored) -> None:
    DiskMachine.TestCase.settings = settings(
        max_examples=max(1, STEPS // PER_RUN),
        stateful_step_count=PER_RUN,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    DiskMachine.TestCase().runTest()
