"""An engine without a model that takes Steps to the letter, and knows when it was lied to.

The KV of a position is a digest of all tokens up to it, so a block that holds anything else than the KV of
its own sequence is seen at once. Tokens are drawn from that digest: they depend on the sequence alone, as
law 1 asks. Run as a program it serves a socket: `step_engine.py SOCKET [SECONDS_PER_STEP]`.
"""

import os
import sys
import time
import zlib
from contextlib import suppress

from ktransformers.engine.protocol import (
    BlockName,
    Go,
    Hello,
    Move,
    Moved,
    Moves,
    MovesDone,
    NewSeq,
    Ready,
    Shutdown,
    SlotToken,
    Step,
    StepDone,
    Stored,
    StoredBlock,
    ToEngine,
    slots_for,
)

VOCAB = 1000


def ready(pid=1, blocks=64, block_tokens=4, max_len=128, max_sequences=8, max_batch_tokens=16, **tiers):
    return Ready(
        pid=pid,
        blocks=blocks,
        block_tokens=block_tokens,
        block_bytes=1024,
        max_len=max_len,
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
        vocab=VOCAB,
        isa="fake",
        steps=0,
        fingerprint=b"fake",
        **tiers,
    )


def digest(before: int, token: int) -> int:
    return zlib.crc32(token.to_bytes(4, "little"), before)


def draw(kv: int, seed: int) -> int:
    return zlib.crc32(seed.to_bytes(8, "little"), kv) % VOCAB


def answer(prompt, sampling, room=1 << 30):
    """What a request must be answered, tokens and finish, if `room` tokens fit after the prompt."""
    kv = 0
    for token in prompt:
        kv = digest(kv, token)
    out = []
    while True:
        out.append(draw(kv, sampling.seed))
        if out[-1] in sampling.stop_tokens:
            return out, "stop"
        if len(out) == min(sampling.max_tokens, room):
            return out, "length"
        kv = digest(kv, out[-1])


class _Sequence:
    def __init__(self, new: NewSeq) -> None:
        self.sampling = new.sampling
        self.n_prompt = new.n_prompt
        self.tokens = list(new.tokens)
        self.kvs = [0]
        self.computed = new.computed
        self.blocks: list[int] = []
        self.live = True
        for token in self.tokens:
            self.kvs.append(digest(self.kvs[-1], token))


POISON = -1
BLOCK_BYTES = 1024


class Mover:
    """Moves, done whenever and in whatever order the test likes, and sometimes not at all.

    While a move is under way the source's bytes must stay and the target is rubbish that nobody may read.
    """

    def __init__(self, engine: "FakeEngine", disk=None) -> None:
        self._engine = engine
        self._host = [[POISON] * engine.ready.block_tokens for _ in range(engine.ready.host_blocks)]
        self.disk: dict[bytes, tuple[BlockName, list[int]]] = disk if disk is not None else {}
        self.under_way: list[tuple[Move, list[int] | None]] = []
        self.done = 0

    def take(self, moves: Moves) -> None:
        for key in moves.forget:
            assert all(m.name is None or m.name.key != key for m, _ in self.under_way), "forgotten in use"
            self.disk.pop(key, None)
        for move in moves.moves:
            assert move.source != move.target
            assert (move.name is not None) == ("disk" in (move.source, move.target))
            assert move.id not in {m.id for m, _ in self.under_way}
            for other, _ in self.under_way:
                target = (move.target, move.target_block)
                if move.target != "disk":
                    assert target != (other.target, other.target_block), "two moves write to one block"
                    assert target != (other.source, other.source_block), "a move writes what another reads"
                    assert (other.target, other.target_block) != (move.source, move.source_block)
            self.under_way.append((move, self._read(move)))
            if move.target != "disk":
                self._write(move, [POISON] * self._engine.ready.block_tokens)

    def finish(self, at: int, fails: bool = False) -> MovesDone:
        move, before = self.under_way.pop(at)
        now = self._read(move)
        assert now == before, "the source has changed"
        if move.target == "device":
            block = self._engine.kv_of(move.target_block)
            assert block == [POISON] * len(block), "a step has written to the target of a move"
        ok = not fails and now is not None
        if ok:
            self._write(move, now)
            self.done += 1
        return MovesDone([Moved(move.id, ok, BLOCK_BYTES if ok else 0, 0.0001)], [])

    def stored(self) -> Stored:
        blocks = [
            StoredBlock(name.key, name.parent, name.owner, BLOCK_BYTES, 0, float(i))
            for i, (name, _) in enumerate(self.disk.values())
        ]
        return Stored(blocks, complete=True)

    def _read(self, move: Move) -> list[int] | None:
        if move.source == "device":
            return self._engine.kv_of(move.source_block)
        if move.source == "host":
            return list(self._host[move.source_block])
        name, kv = self.disk.get(move.name.key, (None, None))
        return kv if name == move.name else None

    def _write(self, move: Move, kv: list[int]) -> None:
        if move.target == "device":
            self._engine.kv_of(move.target_block, kv)
        elif move.target == "host":
            self._host[move.target_block] = list(kv)
        else:
            assert POISON not in kv
            self.disk[move.name.key] = (move.name, kv)


class FakeEngine:
    def __init__(self, ready: Ready, every_step: bool = True) -> None:
        """`every_step`: look at all KV of a sequence in each step, not only when it enters and draws."""
        self.ready = ready
        self.every_step = every_step
        self.computed = 0
        self.poison: set[int] = set()
        """Slots whose next draw is not a number."""
        self._kv = [0] * (ready.blocks * ready.block_tokens)
        self._slots: dict[int, _Sequence] = {}
        self._states = [POISON] * max(ready.kept_states, 0)
        """Of each place the KV of the last token: as good a state as any."""
        self._last = 0
        self._done: set[int] = set()
        self.mover = Mover(self)

    def step(self, step: Step) -> StepDone:
        assert step.n not in self._done
        self._done.add(step.n)
        if step.urgent:
            assert not step.gone and sum(go.n_tokens for go in step.go_on) <= self.ready.urgent_tokens
        else:
            # What lies between were urgent ones, which are done before anything that is planned after them.
            assert set(range(self._last + 1, step.n)) <= self._done
            self._last = step.n
        for slot in step.gone:
            del self._slots[slot]
        for new in step.new:
            assert new.slot not in self._slots
            assert 0 <= new.slot < slots_for(self.ready.max_sequences, self.ready.urgent_tokens)
            assert 1 <= new.n_prompt <= len(new.tokens) < self.ready.max_len
            assert new.computed % self.ready.block_tokens == 0 and new.computed < len(new.tokens)
            assert len(new.tokens) - new.n_prompt < new.sampling.max_tokens
            if self.ready.kept_states >= 0 and new.computed:
                kvs = _Sequence(new).kvs
                assert self._states[new.state] == kvs[new.computed], "a sequence begins with another's state"
            else:
                assert new.state == -1
            self._slots[new.slot] = _Sequence(new)
        assert len({go.slot for go in step.go_on}) == len(step.go_on) <= self.ready.max_sequences
        assert sum(go.n_tokens for go in step.go_on) <= self.ready.max_batch_tokens
        entered = {new.slot for new in step.new}
        drawn = []
        computed = 0
        for go in step.go_on:
            sequence = self._slots[go.slot]
            if not sequence.live:
                continue
            computed += go.n_tokens
            if (token := self._go_on(go, sequence, go.slot in entered)) is not None:
                drawn.append(token)
        self._check_writers()
        self.computed += computed
        return StepDone(step.n, drawn, 0.001 + 0.001 * computed, computed)

    def _go_on(self, go: Go, sequence: _Sequence, entered: bool) -> SlotToken | None:
        assert go.n_tokens >= 1
        sequence.blocks += go.new_blocks
        until = sequence.computed + go.n_tokens
        assert until <= len(sequence.tokens)
        assert until <= len(sequence.blocks) * self.ready.block_tokens
        draws = until == len(sequence.tokens)
        if self.every_step or entered:
            self._check_kv(sequence)
        for position in range(sequence.computed, until):
            self._kv[self._place(sequence, position)] = sequence.kvs[position + 1]
        if go.keep != -1:
            assert 0 <= go.keep < self.ready.kept_states
            assert sequence.computed < go.keep_at <= until and go.keep_at % self.ready.block_tokens == 0
            self._states[go.keep] = sequence.kvs[go.keep_at]
        sequence.computed = until
        return self._draw(go.slot, sequence) if draws else None

    def _draw(self, slot: int, sequence: _Sequence) -> SlotToken:
        if slot in self.poison:
            self.poison.discard(slot)
            sequence.live = False
            return SlotToken(slot, -1, "error")
        token = draw(sequence.kvs[-1], sequence.sampling.seed)
        sequence.tokens.append(token)
        sequence.kvs.append(digest(sequence.kvs[-1], token))
        finish = ""
        if token in sequence.sampling.stop_tokens:
            finish = "stop"
        elif len(sequence.tokens) - sequence.n_prompt >= sequence.sampling.max_tokens:
            finish = "length"
        if finish:
            self._check_kv(sequence)
            sequence.live = False
        return SlotToken(slot, token, finish, -1.0, [(token, -1.0)] * max(sequence.sampling.logprobs, 0))

    def kv_of(self, block: int, new: list[int] | None = None) -> list[int]:
        begin = block * self.ready.block_tokens
        end = begin + self.ready.block_tokens
        if new is not None:
            self._kv[begin:end] = new
        return self._kv[begin:end]

    def _place(self, sequence: _Sequence, position: int) -> int:
        size = self.ready.block_tokens
        return sequence.blocks[position // size] * size + position % size

    def _check_kv(self, sequence: _Sequence) -> None:
        for position in range(sequence.computed):
            stored = self._kv[self._place(sequence, position)]
            assert stored == sequence.kvs[position + 1], "KV of somebody else"

    def _check_writers(self) -> None:
        """No block that a live sequence has yet to write to is in another's table."""
        owners: dict[int, int] = {}
        size = self.ready.block_tokens
        for slot, sequence in self._slots.items():
            if sequence.live:
                for block in sequence.blocks[sequence.computed // size :]:
                    assert owners.setdefault(block, slot) == slot, "two writers of a block"
        for slot, sequence in self._slots.items():
            if sequence.live:
                for block in sequence.blocks[: sequence.computed // size]:
                    assert owners.get(block, slot) == slot, "a block is read while another writes it"


def serve(path: str, step_seconds: float) -> None:
    from ktransformers.engine.channel import PeerGone, Server

    server = Server[ToEngine](path, ToEngine)
    size = {"blocks": 256, "block_tokens": 16, "max_len": 512, "max_sequences": 16, "max_batch_tokens": 128}
    hello = ready(pid=os.getpid(), **size)
    engine, scheduler = FakeEngine(hello, every_step=False), b""
    while True:
        received = server.poll(None)
        if received is None:
            continue
        peer, message = received
        if peer != scheduler and isinstance(message, Hello):
            engine, scheduler = FakeEngine(hello, every_step=False), peer
        if peer != scheduler:
            continue  # the last words of a scheduler that died
        with suppress(PeerGone):
            if isinstance(message, Hello):
                server.send(peer, hello)
            elif isinstance(message, Moves):
                engine.mover.take(message)
                while engine.mover.under_way:
                    server.send(peer, engine.mover.finish(0))
            elif isinstance(message, Step):
                time.sleep(step_seconds)
                server.send(peer, engine.step(message))
            elif isinstance(message, Shutdown):
                return


if __name__ == "__main__":
    serve(sys.argv[1], float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
