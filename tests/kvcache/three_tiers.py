"""The cache of three tiers against an oracle, moved at random: nothing is ever found that is not what the
name says, and nothing is leaked, whatever the mover does.

`python three_tiers.py STEPS [SEED]` runs it for long.
"""

import random
import sys
from collections import Counter, deque

from ktransformers.kvcache.blocks import BlockTable, Tier
from ktransformers.kvcache.manager import KVCache
from ktransformers.kvcache.moves import Transfer

SIZE = 4
BYTES = 100
SCOPES = (b"a" * 32, b"b" * 32, b"public")


class Sequence:
    def __init__(self, table: BlockTable, scope: bytes, tokens: list[int]) -> None:
        self.table, self.scope, self.tokens = table, scope, tokens
        self.written = 0


class Machine:
    """What the engine would hold: `kv[tier][block][i]` names the sequence that it was computed for."""

    def __init__(self, seed: int, blocks: int = 24, host: int = 30, disk: int = 40) -> None:
        self.rng = random.Random(seed)
        self.sizes = (blocks, host, disk * BYTES)
        self.disk: dict[bytes, tuple[Transfer | None, object]] = {}
        self.seen: Counter[str] = Counter()
        self.crash()

    def crash(self) -> None:
        """The engine dies; the disk stays."""
        blocks, host, disk = self.sizes
        self.kv = ([[None] * SIZE for _ in range(blocks)], [[None] * SIZE for _ in range(host)])
        self.cache = KVCache(
            blocks, SIZE, b"f", block_bytes=BYTES, host_blocks=host, disk_bytes=disk,
            recompute=lambda start, n: self.rng.choice([None, 0.0, 1e9]),
        )  # fmt: skip
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.under_way: list[tuple[Transfer, object]] = []
        self.planned = self.done = 0
        self.now = 0.0
        for key, (name, _) in self.disk.items():
            self.cache.stored(key, name[0], name[1], BYTES, self.rng.randrange(3))

    # ---- what a block says

    def value(self, s: Sequence, position: int) -> object:
        return s.scope, tuple(s.tokens[: position + 1])

    def read(self, copy, name) -> object:
        if copy.tier is Tier.DISK:
            stored_name, value = self.disk.get(copy.entry.key, (None, None))
            return value if stored_name == name else None
        return list(self.kv[copy.tier][copy.block])

    # ---- moves

    def submit(self) -> None:
        scope = self.rng.choice(SCOPES)
        quota = self.rng.choice([(0, 0, 0), (500,) * 3])
        owner = self.cache.owner(scope.hex(), self.rng.choice([1.0, 2.0]), quota)
        length = self.rng.randrange(1, 40)
        tokens = [1] * length if self.rng.random() < 0.5 else [self.rng.randrange(2) for _ in range(length)]
        s = Sequence(self.cache.open(scope, owner), scope, tokens)
        self.waiting.append(s)
        self.cache.prefetch(s.table, s.tokens)

    def cancel(self) -> None:
        if self.waiting:
            index = self.rng.randrange(len(self.waiting))
            self.cache.loads.drop(self.waiting[index].table)
            del self.waiting[index]

    def enter(self) -> None:
        if not self.waiting or len(self.running) > 3:
            return
        s = self.waiting[0]
        if self.cache.waits(s.table, s.tokens, self.now, 0.0):
            return
        self.waiting.popleft()
        found = self.cache.match(s.table, s.tokens)
        self.cache.attach(s.table, found)
        s.written = len(found) * SIZE
        self.seen["found"] += len(found)
        self.running.append(s)
        for position in range(s.written):
            self.check(s, position)

    def check(self, s: Sequence, position: int) -> None:
        got = self.kv[Tier.DEVICE][s.table.blocks[position // SIZE]][position % SIZE]
        want = self.value(s, position)
        public = (SCOPES[2], want[1])
        assert got in (want, public), "somebody else's KV"

    def compute(self) -> None:
        if not self.running:
            return
        s = self.rng.choice(self.running)
        until = min(s.written + self.rng.randrange(1, 9), len(s.tokens))
        if self.cache.missing(s.table, until) > self.cache.available:
            return
        self.cache.grow(s.table, until)
        self.planned += 1
        self.cache.step_planned(self.planned)
        for position in range(s.written, until):
            self.kv[Tier.DEVICE][s.table.blocks[position // SIZE]][position % SIZE] = self.value(s, position)
        s.written = until
        self.done = self.planned
        self.cache.step_done(self.done)
        self.cache.commit(s.table, s.tokens, until)

    def leave(self) -> None:
        if self.running:
            s = self.running.pop(self.rng.randrange(len(self.running)))
            for position in range(s.written):
                self.check(s, position)
            if self.rng.random() < 0.03:
                self.cache.discard(s.table)
            elif self.rng.random() < 0.2:
                self.cache.release(s.table)
                self.waiting.appendleft(s)
            else:
                self.cache.release(s.table, len(s.tokens))

    def send(self) -> None:
        self.now += self.rng.choice([0.0, 0.01, 1.0, 40.0])
        transfers, forgotten = self.cache.send(self.now)
        for key in forgotten:
            self.disk.pop(key, None)
        for t in transfers:
            name = t.entry.parent, t.entry.owner.id, t.content
            self.under_way.append((t, name))
            if t.target.tier is not Tier.DISK:
                self.kv[t.target.tier][t.target.block] = ["rubbish"] * SIZE

    def finish(self) -> None:
        if not self.under_way:
            return
        t, name = self.under_way.pop(self.rng.randrange(len(self.under_way)))
        value = self.read(t.source, name)
        ok = value is not None and self.rng.random() < 0.9
        if ok and t.target.tier is Tier.DISK:
            assert all(part is not None and part != "rubbish" for part in value)
            self.disk[t.entry.key] = name, value
        elif ok:
            assert self.kv[t.target.tier][t.target.block] == ["rubbish"] * SIZE, "written twice"
            self.kv[t.target.tier][t.target.block] = list(value)
        self.seen[f"{t.source.tier.name} to {t.target.tier.name}"] += ok
        self.cache.moves.finish(t.id, ok, BYTES if ok else 0, 0.001)

    def lose(self) -> None:
        """The disk loses a block, says so or is found out."""
        if self.disk:
            key = self.rng.choice(list(self.disk))
            del self.disk[key]
            if self.rng.random() < 0.5:
                self.cache.lost(key)

    def step(self) -> None:
        acts = (self.submit, self.enter, self.compute, self.leave, self.send, self.finish, self.cancel)
        act = self.rng.choices(acts, (6, 8, 24, 5, 10, 24, 1))[0]
        if self.rng.random() < 0.002:
            act = self.lose
        if self.rng.random() < 0.0005:
            act = self.crash
        act()
        if len(self.waiting) > 20:
            self.cancel()
        self.cache.check([s.table for s in self.running])
        assert self.cache.used + self.cache.available == self.cache.total

    def drain(self) -> None:
        """Everybody leaves, and every move is answered: nothing is held."""
        while self.waiting:
            self.cancel()
        while self.running:
            self.leave()
            while self.waiting:
                self.cancel()
        for _ in range(10_000):
            self.send()
            if not self.under_way:
                break
            while self.under_way:
                self.finish()
        self.cache.check([])
        assert self.cache.used == 0 and not self.cache.loads.held
        assert len(self.disk) * BYTES <= self.sizes[2]


def run(steps: int, seed: int) -> Counter[str]:
    machine = Machine(seed)
    for _ in range(steps):
        machine.step()
    machine.drain()
    return machine.seen


if __name__ == "__main__":
    print(dict(run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
