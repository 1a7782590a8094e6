"""The KV cache under anything its caller may do, in any order."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from ktransformers.kvcache.manager import KVCache

SIZE = 3


class Sequence:
    def __init__(self, cache: KVCache, scope: bytes, tokens: list[int]) -> None:
        self.scope, self.tokens = scope, tokens
        self.table = cache.open(scope)
        self.written = 0


class Machine(RuleBasedStateMachine):
    """`content` is what the engine would have written into each block, by position of the token."""

    sequences = Bundle("sequences")

    @initialize(blocks=st.integers(1, 12), reuse=st.booleans())
    def start(self, blocks, reuse):
        self.cache = KVCache(blocks, SIZE, b"fingerprint", reuse)
        self.live: list[Sequence] = []
        self.content: dict[int, list[object]] = {b: [None] * SIZE for b in range(blocks)}

    @rule(
        target=sequences,
        scope=st.sampled_from([b"", b"a"]),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
    )
    def enter(self, scope, tokens):
        sequence = Sequence(self.cache, scope, tokens)
        found = self.cache.match(sequence.table, tokens)
        assert len(found) * SIZE < len(tokens)
        before = self.cache.available
        idle = self.cache.idle(found)
        self.cache.attach(sequence.table, found)
        assert self.cache.available == before - idle
        sequence.written = len(found) * SIZE
        self.live.append(sequence)
        return sequence

    @rule(sequence=sequences, n=st.integers(1, 6), commits=st.booleans())
    def compute(self, sequence, n, commits):
        """n more tokens are written; the step may be known to be done, or not yet."""
        until = min(sequence.written + n, len(sequence.tokens))
        if self.cache.missing(sequence.table, until) > self.cache.available:
            return
        self.cache.grow(sequence.table, until)
        for p in range(sequence.written, until):
            block = self.content[sequence.table.blocks[p // SIZE]]
            block[p % SIZE] = (sequence.scope, sequence.tokens[: p + 1])
        sequence.written = until
        if commits:
            self.cache.commit(sequence.table, sequence.tokens, until)

    @rule(sequence=consumes(sequences))
    def leave(self, sequence):
        self.cache.release(sequence.table)
        self.live.remove(sequence)

    @rule(sequence=consumes(sequences))
    def fail(self, sequence):
        self.cache.discard(sequence.table)
        self.live.remove(sequence)

    @invariant()
    def blocks_are_conserved(self):
        self.cache.check([s.table for s in self.live])
        assert self.cache.used + self.cache.available == self.cache.total

    @invariant()
    def everybody_reads_their_own_kv(self):
        for s in self.live:
            for p in range(s.written):
                assert self.content[s.table.blocks[p // SIZE]][p % SIZE] == (s.scope, s.tokens[: p + 1])


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
