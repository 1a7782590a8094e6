"""Moves of blocks, as the scheduler asks for them: what is wrong is refused, and all are answered once."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from block_moves import BLOCK_TOKENS, BLOCKS, HOST_BLOCKS, move, name
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransformers.engine import moves as moves_module
from ktransformers.engine.moves import BlockMoves
from ktransformers.engine.protocol import (
    BlockName,
    Go,
    Move,
    Moved,
    Moves,
    MovesDone,
    NewSeq,
    Sampling,
    Step,
    StepDone,
)
from ktransformers.engine.runner import Limits, Runner
from ktransformers.kvcache.stores.disk import DiskStore
from ktransformers.kvcache.stores.memory import HostBlocks

GREEDY = Sampling(temperature=0.0, max_tokens=100)


class Rig:
    """BlockMoves over a fake executor and real stores."""

    def __init__(self, fake: ModuleType, folder: Path) -> None:
        self.executor = fake.FakeExecutor(BLOCKS, BLOCK_TOKENS)
        size = self.executor.block_bytes
        self.host = HostBlocks(HOST_BLOCKS, size)
        self.disk = DiskStore.open(folder, fake.FINGERPRINT, size, 1 << 24)
        self.woken = threading.Semaphore(0)
        self.moves = BlockMoves(self.executor, self.host, self.disk, self.woken.release)

    def do(self, *moves: Move) -> dict[int, Moved]:
        """Start them; the answers to all."""
        self.moves.start(Moves(list(moves), []))
        return self.wait(len(moves))

    def wait(self, count: int) -> dict[int, Moved]:
        """So many answers, or more that came with them; each comes once."""
        found: dict[int, Moved] = {}
        while True:
            news = self.moves.news()
            for moved in news.moves if news is not None else []:
                assert moved.id not in found
                found[moved.id] = moved
            if len(found) >= count:
                return found
            assert self.woken.acquire(timeout=120)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No copy touches memory, so that all moves stay open."""
        gates = [worker.gate for worker in self.moves._mover._workers]
        for gate in gates:
            gate.acquire()
        try:
            yield
        finally:
            for gate in gates:
                gate.release()

    def close(self) -> None:
        self.moves.close(20)
        self.disk.close()


@pytest.fixture
def rig(fake: ModuleType, tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(fake, tmp_path / "kv")
    yield rig
    rig.close()


WRONG = [
    move(1, "device", 0, "device", 1),
    move(1, "host", 0, "host", 1),
    move(1, "disk", -1, "disk", -1, 1),
    move(1, "device", -1, "host", 0),
    move(1, "device", BLOCKS, "host", 0),
    move(1, "device", 2**63 - 1, "host", 0),
    move(1, "device", 0, "host", HOST_BLOCKS),
    move(1, "device", 0, "host", -(2**63)),
    move(1, "device", 0, "host", 0, 1),
    move(1, "device", 0, "disk", -1),
    move(1, "device", 0, "disk", 0, 1),
    move(1, "disk", 3, "device", 0, 1),
    Move(id=1, source="disk", target="device", target_block=0, name=BlockName(b"", b"", b"", b"")),
    Move(id=1, source="device", source_block=0, target="disk", name=BlockName(b"k" * 32, b"", b"", b"")),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_moves_are_refused(rig: Rig, wrong: Move) -> None:
    before = rig.executor.kv.copy()
    assert rig.do(wrong) == {1: Moved(1, False, 0, 0.0)}
    assert (rig.executor.kv == before).all() and not rig.moves.arriving
    assert rig.do(move(1, "device", 0, "host", 0))[1].ok


def test_there_may_be_no_other_tier(fake: ModuleType) -> None:
    moves = BlockMoves(fake.FakeExecutor(4, 16), None, None, lambda: None)
    moves.start(Moves([move(1, "device", 0, "host", 0), move(2, "device", 0, "disk", -1, 1)], [b"x" * 32]))
    assert moves.news() == MovesDone([Moved(1, False, 0, 0.0), Moved(2, False, 0, 0.0)], [])
    assert moves.news() is None
    moves.close(20)


def test_moves_that_would_meet_are_refused(rig: Rig) -> None:
    rig.disk.put(name(1), bytes(rig.executor.block_bytes))
    good = [
        move(1, "device", 0, "host", 0),
        move(2, "device", 0, "host", 1),  # a source may be read twice
        move(3, "disk", -1, "device", 1, 1),
        move(4, "host", 2, "disk", -1, 2),
    ]
    bad = [
        move(11, "device", 5, "host", 0),  # is written already
        move(12, "host", 3, "device", 0),  # is being read
        move(13, "device", 1, "host", 3),  # is being written
        move(14, "disk", -1, "host", 4, 2),
        move(15, "device", 5, "disk", -1, 1),
    ]
    with rig.held():
        rig.moves.start(Moves([*good, *bad], []))
        news = rig.moves.news()
    assert news == MovesDone([Moved(m.id, False, 0, 0.0) for m in bad], [])
    assert all(moved.ok for moved in rig.wait(len(good)).values())
    assert all(moved.ok for moved in rig.do(*bad[:2]).values())  # nothing of it is left


def test_a_number_twice_has_one_answer(rig: Rig) -> None:
    with rig.held():
        rig.moves.start(Moves([move(1, "device", 0, "host", 0), move(1, "device", 1, "host", 1)], []))
    assert rig.wait(1)[1].ok and rig.moves.news() is None
    assert (rig.host.view(0) == rig.executor.kv[0].view("u1")).all()
    assert (rig.host.view(1) == 0).all()


def test_a_sequence_gets_no_block_that_is_still_arriving(rig: Rig) -> None:
    runner = Runner(rig.executor, Limits(BLOCKS, BLOCK_TOKENS, 256, 4, 64, 1000), rig.moves.arriving)

    def finish(n: int) -> str:
        done = runner.step(Step(n, [0] * n, [NewSeq(0, [1, 2, 3], 3, 0, GREEDY)], [Go(0, 3, [3])]))
        assert isinstance(done, StepDone)
        return done.tokens[0].finish

    with rig.held():
        rig.moves.start(Moves([move(1, "host", 0, "device", 3)], []))
        assert finish(0) == "error"
    rig.wait(1)
    assert finish(1) == ""


def test_what_does_not_end_is_given_up(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answered once, as a miss; what it was to write is another's at once, and it leaves that alone."""
    monkeypatch.setattr(moves_module, "PATIENCE_SECONDS", 3600.0)
    before = rig.executor.kv.copy()
    with rig.held():
        asked = [move(i, "host", i, "device", i) for i in range(4)]
        rig.moves.start(Moves(asked, []))
        rig.moves.give_up_overdue()
        assert not rig.moves.has_news and rig.moves.arriving == {0, 1, 2, 3}
        monkeypatch.setattr(moves_module, "PATIENCE_SECONDS", -1.0)
        given_up = threading.Thread(target=rig.moves.give_up_overdue)
        given_up.start()
        given_up.join(0.2)
    given_up.join(20)
    assert {i: m.ok for i, m in rig.wait(4).items()} == dict.fromkeys(range(4), False)
    assert rig.moves.is_idle and not rig.moves.arriving
    assert rig.do(move(4, "device", 9, "host", 7))[4].ok
    assert (rig.executor.kv == before).all() and rig.moves.news() is None


def test_losses_and_names_to_forget(rig: Rig) -> None:
    assert rig.do(move(1, "device", 0, "disk", -1, 1))[1].bytes > rig.executor.block_bytes
    rig.moves.start(Moves([], [name(1).key, b"short", name(2).key]))
    assert not rig.do(move(2, "disk", -1, "device", 1, 1))[2].ok
    assert rig.disk.entries() == []


_TIERS = st.sampled_from(["device", "host", "disk"])
_NUMBERS = st.integers(-2, 18) | st.integers(-(2**63), 2**63 - 1)
_NAMES = st.none() | st.integers(0, 3).map(name) | st.builds(BlockName, *[st.binary(max_size=70)] * 4)
_MOVES = st.builds(
    Move,
    id=st.integers(0, 12),
    source=_TIERS,
    source_block=st.just(-1) | _NUMBERS,
    target=_TIERS,
    target_block=st.just(-1) | _NUMBERS,
    name=_NAMES,
)


@settings(max_examples=150, deadline=None)
@given(messages=st.lists(st.lists(_MOVES, max_size=12), max_size=4))
def test_any_move_has_one_answer(shared: Rig, messages: list[list[Move]]) -> None:
    """Whatever is asked, nothing is raised, and blocks stay whole."""
    for i, row in enumerate(shared.executor.kv):
        row[:] = i
    for moves in messages:
        numbered = [msgspec.structs.replace(m, id=i) for i, m in enumerate(moves)]
        shared.moves.start(Moves(numbered, [m.name.key for m in moves if m.name is not None and m.id == 7]))
        assert set(shared.wait(len(numbered))) == set(range(len(numbered)))
    assert not shared.moves.arriving and shared.moves.news() is None
    for row in shared.executor.kv:
        assert len(set(row.tolist())) == 1


@pytest.fixture(scope="module")
def shared(fake: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    rig = Rig(fake, tmp_path_factory.mktemp("shared") / "kv")
    yield rig
    rig.close()
