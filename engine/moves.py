"""The engine's side of the tiers: what the scheduler wants copied is checked here, then left to the mover.

What is wrong with one move refuses that move, which is a miss: nothing that crosses the socket ends the
process.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from typing import Final

from ktransformers.engine.batch import Executor
from ktransformers.engine.protocol import BlockName, Move, Moved, Moves, MovesDone, Tier
from ktransformers.kvcache.mover import Mover
from ktransformers.kvcache.stores.memory import HostBlocks
from ktransformers.kvcache.stores.store import BlockStore

log = logging.getLogger(__name__)

_KEY_BYTES: Final = 32
_OWNER_BYTES: Final = 16
_TOKEN_BYTES: Final = 4
PATIENCE_SECONDS: Final = 60.0
"""A copy that takes longer, its wait included, is given up: a disk that hangs may hold no blocks for good."""

Place = tuple[Tier, int | bytes]
"""A block of the device or the host, or a key on disk."""


class MoveError(ValueError):
    """A move that cannot be done."""


class BlockMoves:
    """Moves that the scheduler has asked for and has not been answered."""

    def __init__(
        self, executor: Executor, host: HostBlocks | None, disk: BlockStore | None, wake: Callable[[], None]
    ) -> None:
        """`wake` is called, in another thread, when `news` has something after it had nothing."""
        self.arriving: set[int] = set()
        """Device blocks that are being written: no step may use them."""
        self._blocks: dict[Tier, int] = {"device": executor.blocks, "host": host.blocks if host else 0}
        self._content_bytes = executor.block_tokens * _TOKEN_BYTES
        self._disk = disk
        self._mover = Mover(executor, host, disk, wake)
        self._open: dict[int, tuple[Move, float]] = {}
        """The move and when it was started, the oldest first."""
        self._written: set[Place] = set()
        self._read: Counter[Place] = Counter()
        self._refused: list[Moved] = []

    def start(self, message: Moves) -> None:
        """Start what can be done; the rest is refused with the next `news`."""
        if message.forget and self._disk is not None:
            self._disk.forget([key for key in message.forget if len(key) == _KEY_BYTES])
        wrong = ""
        for move in message.moves:
            try:
                self._start(move)
            except MoveError as error:
                wrong = wrong or f"move {move.id} from {move.source} to {move.target}: {error}"
        if wrong:
            log.warning("moves are refused, the first of them %s", wrong)

    def _start(self, move: Move) -> None:
        """Errors: MoveError, with the refusal noted."""
        if move.id in self._open:
            # An answer would be taken for that of the first.
            raise MoveError("a move of this number is under way")
        try:
            source, target = self._check(move)
        except MoveError:
            self._refuse(move)
            raise
        if not self._mover.start(move):
            self._refuse(move)
            return
        self._open[move.id] = move, time.monotonic()
        self._read[source] += 1
        self._written.add(target)
        if move.target == "device":
            self.arriving.add(move.target_block)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be answered."""
        return not self._open and not self._refused

    @property
    def has_news(self) -> bool:
        """Whether `news` would give something that has ended, or was refused."""
        return bool(self._refused) or self._mover.has_news

    def give_up_overdue(self) -> None:
        """Refuse, with the next `news`, what has not ended in PATIENCE_SECONDS."""
        overdue = time.monotonic() - PATIENCE_SECONDS
        late = [move.id for move, _ in takewhile(lambda item: item[1] < overdue, self._open.values())]
        if not late:
            return
        for number in self._mover.give_up(late):
            move, _ = self._open.pop(number)
            self._close(move)
            self._refuse(move)
        log.warning("%d copies take too long, and those that have not ended are given up", len(late))

    def news(self) -> MovesDone | None:
        """What has ended since the last call."""
        if not self.has_news:
            return None
        moved, self._refused = self._refused, []
        for done in self._mover.take():
            self._close(self._open.pop(done.id)[0])
            moved.append(Moved(done.id, done.ok, done.bytes, done.seconds))
        # After the moves: a block may be stored and then lost, but not the other way round.
        return MovesDone(moved, self._disk.lost() if self._disk is not None else [])

    def abandon(self) -> None:
        """Another scheduler has come: no block is touched for the last one any more."""
        self._mover.abandon()
        self._open.clear()
        self._written.clear()
        self._read.clear()
        self._refused.clear()
        self.arriving.clear()

    def close(self, seconds: float) -> None:
        """End the copies, giving those that are under way on disk that long."""
        self._mover.close(seconds)

    def _refuse(self, move: Move) -> None:
        self._refused.append(Moved(move.id, False, 0, 0.0))

    def _close(self, move: Move) -> None:
        source, target = _places(move)
        self._written.discard(target)
        self._read[source] -= 1
        if not self._read[source]:
            del self._read[source]
        if move.target == "device":
            self.arriving.discard(move.target_block)

    def _check(self, move: Move) -> tuple[Place, Place]:
        """Where from and where to. Errors: MoveError."""
        if move.source == move.target:
            raise MoveError("the tiers are the same")
        self._check_side(move.source, move.source_block, move.name)
        self._check_side(move.target, move.target_block, move.name)
        if "disk" not in (move.source, move.target) and move.name is not None:
            raise MoveError("a name is for the disk")
        source, target = _places(move)
        if target in self._written or target in self._read:
            raise MoveError("another move uses the target")
        if source in self._written:
            raise MoveError("another move is writing the source")
        return source, target

    def _check_side(self, tier: Tier, block: int, name: BlockName | None) -> None:
        if tier != "disk":
            if not 0 <= block < self._blocks[tier]:
                raise MoveError(f"the {tier} tier has blocks 0 to {self._blocks[tier] - 1}, not {block}")
            return
        if self._disk is None:
            raise MoveError("there is no disk tier")
        if block != -1 or name is None:
            raise MoveError("on disk a block has a name and no number")
        sizes = (len(name.key), len(name.parent), len(name.owner), len(name.content))
        if sizes != (_KEY_BYTES, _KEY_BYTES, _OWNER_BYTES, self._content_bytes):
            raise MoveError(f"a name of {sizes} bytes")


def _places(move: Move) -> tuple[Place, Place]:
    def place(tier: Tier, block: int) -> Place:
        return (tier, move.name.key) if tier == "disk" and move.name is not None else (tier, block)

    return place(move.source, move.source_block), place(move.target, move.target_block)
