"""The scheduler under anything that may happen to it, in any order.

The fake engine checks each step (KV, writers, slots, budget), the world each answer (token for token) and
that it has one end, `Scheduler.check` blocks and slots after every move. Moves between tiers end late, in any
order, or fail; the disk outlives the engine. Some models have states: the engine checks what is begun with.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from step_engine import BLOCK_BYTES
from world import World

from ktransformers.scheduler.engine_life import IN_FLIGHT

PATTERNS = [[1, 2, 3, 4, 5, 6, 7, 8] * 5, [1, 2, 3, 4, 9, 9, 9, 9] * 5, [5] * 40]


class Machine(RuleBasedStateMachine):
    @initialize(
        blocks=st.integers(4, 40),
        block_tokens=st.sampled_from([1, 2, 4]),
        slots=st.integers(1, 6),
        budget=st.sampled_from([1, 3, 16, 64]),
        reuse=st.booleans(),
        believed=st.sampled_from([0.0, 1.0]),
        host_blocks=st.sampled_from([0, 3, 100]),
        disk_blocks=st.sampled_from([0, 5, 100]),
        kept_states=st.sampled_from([-1, -1, 0, 1, 3, 100]),
        urgent_tokens=st.sampled_from([0, 1, 8, 64]),
    )
    def start(self, blocks, block_tokens, slots, budget, reuse, believed, kept_states, **tiers):
        if kept_states >= 0:
            # What the engine has not got together.
            tiers |= {"host_blocks": 0, "disk_blocks": 0, "urgent_tokens": 0}
        self.w = World(
            reuse=reuse,
            blocks=blocks,
            block_tokens=block_tokens,
            max_len=48,
            max_sequences=slots,
            max_batch_tokens=budget,
            host_blocks=tiers["host_blocks"],
            disk_bytes=tiers["disk_blocks"] * BLOCK_BYTES,
            kept_states=kept_states,
            urgent_tokens=tiers["urgent_tokens"],
        )
        # 0: everybody is thought to stop at once, so that too many are let in and blocks run out.
        self.w.scheduler._estimate.prior = believed
        self.n = 0
        self.crashes = 0

    @rule(
        pattern=st.sampled_from(PATTERNS),
        length=st.integers(1, 40),
        max_tokens=st.integers(1, 30),
        stops=st.frozensets(st.integers(0, 999), max_size=200),
        scope=st.sampled_from([b"", b"a"]),
        seed=st.integers(0, 3),
        deadline=st.sampled_from([0.0, 0.0, 0.05, 1.0]),
    )
    def submit(self, pattern, length, max_tokens, stops, scope, seed, deadline):
        self.n += 1
        self.w.submit(
            f"r{self.n}",
            pattern[:length],
            max_tokens=max_tokens,
            stop_tokens=tuple(sorted(stops)),
            scope=scope,
            seed=seed,
            deadline=deadline,
        )

    @precondition(lambda self: self.n)
    @rule(which=st.integers(0, 1 << 30))
    def cancel(self, which):
        self.w.cancel(f"r{1 + which % self.n}")

    @rule(steps=st.integers(1, 8), urgent_late=st.booleans())
    def engine_works(self, steps, urgent_late):
        for _ in range(steps):
            self.w.engine_step(urgent_late)
            assert len(self.w.to_do) <= IN_FLIGHT

    @rule(which=st.lists(st.integers(0, 1 << 30), min_size=1, max_size=8), fails=st.integers(0, 3))
    def moves_end(self, which, fails):
        for at in which:
            self.w.finish_move(at, fails == 3)

    @precondition(lambda self: self.w.engine is not None)
    @rule(slot=st.integers(0, 5))
    def a_draw_is_not_a_number(self, slot):
        self.w.engine.poison.add(slot)

    @precondition(lambda self: self.w.engine is not None)
    @rule()
    def the_engine_dies(self):
        self.w.kill_engine()
        self.crashes += 1

    @precondition(lambda self: self.w.engine is None)
    @rule()
    def the_engine_comes_back(self):
        self.w.start_engine()

    @rule()
    def a_second_passes(self):
        self.w.wait(1)

    def teardown(self):
        if not hasattr(self, "w"):
            return
        if self.w.engine is None:
            self.w.start_engine()
        self.w.settle()
        self.w.check_drained()
        allowed = {"stop", "length", "cancelled", "deadline", "numerical_error", "context_length_exceeded"}
        if self.crashes:
            allowed |= {"engine_restarted", "internal"}
        assert set(self.w.ends.values()) <= allowed


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
