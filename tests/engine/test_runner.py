"""Slots and batches, over a fake executor that reads every sequence back through its block table."""

import math
import random
import time
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest

from ktransformers.engine.protocol import Fault, Go, NewSeq, Sampling, SlotToken, Step, StepDone
from ktransformers.engine.runner import Limits, Runner

GREEDY = Sampling(temperature=0.0, max_tokens=1000)
BT = 4


@pytest.fixture
def runner(fake: ModuleType) -> Runner:
    return make(fake)


def make(fake: ModuleType, **limits: int) -> Runner:
    sizes = {"blocks": 64, "max_len": 80, "max_sequences": 8, "max_batch_tokens": 64} | limits
    return Runner(fake.FakeExecutor(sizes["blocks"], BT), Limits(**sizes, block_tokens=BT, vocab=1000))


def sampling(**changes: Any) -> Sampling:
    return msgspec.structs.replace(GREEDY, **changes)


def seq(slot: int, tokens: list[int], n_prompt: int = 0, computed: int = 0, s: Sampling = GREEDY) -> NewSeq:
    return NewSeq(slot, tokens, n_prompt or len(tokens), computed, s)


def done(answer: StepDone | Fault) -> list[SlotToken]:
    assert isinstance(answer, StepDone), answer
    return answer.tokens


def blocks_for(slot: int, begin: int, end: int) -> list[int]:
    """Ids of the blocks that positions [begin, end) newly need, eight blocks a slot."""
    return [slot * 8 + b for b in range(-(-begin // BT), -(-end // BT))]


def test_decode_matches_the_plain_sequence(runner: Runner, fake: ModuleType) -> None:
    prompt = [5, 6, 7, 8, 9]
    answer = done(runner.step(Step(0, [], [seq(3, prompt)], [Go(3, 5, blocks_for(3, 0, 5))])))
    drawn = [answer[0].token]
    for n in range(1, 12):
        length = len(prompt) + n
        answer = done(runner.step(Step(n, [], [], [Go(3, 1, blocks_for(3, length - 1, length))])))
        assert [token.slot for token in answer] == [3]
        drawn.append(answer[0].token)
    assert drawn == fake.generate(prompt, 12)
    assert runner.steps == 12


@pytest.mark.parametrize("seed", range(6))
def test_tokens_do_not_depend_on_chunks_or_neighbours(fake: ModuleType, seed: int) -> None:
    """Random chunked prefill, decode, preemption and re-entry of several sequences at once."""
    rng = random.Random(seed)
    runner = make(fake)
    prompts = {slot: [rng.randrange(600) for _ in range(rng.randint(1, 20))] for slot in range(6)}
    known = {slot: list(prompt) for slot, prompt in prompts.items()}
    computed = dict.fromkeys(prompts, -1)  # -1: not in the engine
    for n in range(150):
        gone, new, going = [], [], []
        for slot, tokens in known.items():
            if len(tokens) == len(prompts[slot]) + 10:
                continue
            if computed[slot] >= 0 and rng.random() < 0.03:
                gone.append(slot)
                computed[slot] = -1
            if computed[slot] < 0 and rng.random() < 0.4:
                new.append(seq(slot, list(tokens), len(prompts[slot])))
                computed[slot] = 0
            if computed[slot] >= 0 and rng.random() < 0.7:
                count = rng.randint(1, min(len(tokens) - computed[slot], 9))
                going.append(Go(slot, count, blocks_for(slot, computed[slot], computed[slot] + count)))
                computed[slot] += count
        rng.shuffle(going)
        for token in done(runner.step(Step(n, gone, new, going))):
            assert computed[token.slot] == len(known[token.slot])
            known[token.slot].append(token.token)
    for slot, prompt in prompts.items():
        assert known[slot] == prompt + fake.generate(prompt, len(known[slot]) - len(prompt))
    assert sum(map(len, known.values())) > sum(map(len, prompts.values())) + 30


def test_prefix_hit_reads_the_blocks_of_another(runner: Runner, fake: ModuleType) -> None:
    prompt = list(range(10, 20))
    done(runner.step(Step(0, [], [seq(0, prompt)], [Go(0, 10, [0, 1, 2])])))
    other = [*prompt[:8], 99, 98]
    answer = done(runner.step(Step(1, [0], [seq(1, other, computed=8)], [Go(1, 2, [0, 1, 7])])))
    assert answer[0].token == fake.next_token(other)


def test_ends(fake: ModuleType) -> None:
    prompt = [1, 2, 3]
    tokens = fake.generate(prompt, 6)

    def run(s: Sampling, **limits: int) -> tuple[list[int], str]:
        runner = make(fake, **limits)
        drawn: list[int] = []
        new, count = [seq(0, prompt, s=s)], 3
        for n in range(10):
            blocks = blocks_for(0, 0, limits.get("max_len", 60)) if n == 0 else []
            answer = done(runner.step(Step(n, [], new, [Go(0, count, blocks)])))
            new, count = [], 1
            drawn.append(answer[0].token)
            if answer[0].finish:
                # Steps already planned are ignored.
                assert done(runner.step(Step(n + 1, [], [], [Go(0, 1, [])]))) == []
                return drawn, answer[0].finish
        return drawn, ""

    assert run(sampling(max_tokens=4)) == (tokens[:4], "length")
    assert run(sampling(max_tokens=1)) == (tokens[:1], "length")
    assert run(sampling(stop_tokens=(tokens[2],))) == (tokens[:3], "stop")
    assert run(sampling(stop_tokens=(tokens[2],), max_tokens=3)) == (tokens[:3], "stop")
    assert run(sampling(), max_len=7) == (tokens[:4], "length")


def test_not_finite_logits_end_that_sequence_only(runner: Runner, fake: ModuleType) -> None:
    bad = [1, fake.NOT_FINITE]
    step = Step(0, [], [seq(0, bad), seq(1, [1, 2])], [Go(0, 2, [0]), Go(1, 2, [1])])
    assert done(runner.step(step)) == [SlotToken(0, -1, "error"), SlotToken(1, fake.next_token([1, 2]))]
    assert [t.slot for t in done(runner.step(Step(1, [], [], [Go(0, 1, []), Go(1, 1, [])])))] == [1]


@pytest.mark.parametrize("where", range(5))
def test_a_sequence_that_makes_the_executor_raise(runner: Runner, fake: ModuleType, where: int) -> None:
    prompts = [[slot, 2] for slot in range(5)]
    prompts[where] = [1, fake.POISON]
    new = [seq(slot, prompt) for slot, prompt in enumerate(prompts)]
    answer = done(runner.step(Step(0, [], new, [Go(slot, 2, [slot]) for slot in range(5)])))
    expected = [SlotToken(slot, fake.next_token(prompt)) for slot, prompt in enumerate(prompts)]
    expected[where] = SlotToken(where, -1, "error")
    assert answer == expected


BAD_SEQUENCES = {
    "no tokens": NewSeq(0, [], 0, 0, GREEDY),
    "no prompt": NewSeq(0, [1, 2], 0, 0, GREEDY),
    "prompt longer than tokens": NewSeq(0, [1, 2], 3, 0, GREEDY),
    "too long": NewSeq(0, [1] * 80, 80, 0, GREEDY),
    "negative token": NewSeq(0, [1, -1], 2, 0, GREEDY),
    "token outside the vocabulary": NewSeq(0, [1000], 1, 0, GREEDY),
    "huge token": NewSeq(0, [2**60], 1, 0, GREEDY),
    "computed is no block": NewSeq(0, [1] * 10, 10, 3, GREEDY),
    "computed is all": NewSeq(0, [1] * 8, 8, 8, GREEDY),
    "computed is negative": NewSeq(0, [1] * 8, 8, -4, GREEDY),
    "nothing left to draw": NewSeq(0, [1] * 8, 6, 0, sampling(max_tokens=2)),
    **{
        f"{name}={value}": NewSeq(0, [1], 1, 0, sampling(**{name: value}))
        for name, value in [
            ("temperature", math.nan),
            ("temperature", -1.0),
            ("temperature", math.inf),
            ("top_p", 1.1),
            ("top_p", math.nan),
            ("min_p", -0.1),
            ("top_k", -1),
            ("top_k", 2**40),
            ("repetition_penalty", 0.0),
            ("repetition_window", 2**40),
            ("presence_penalty", -math.inf),
            ("frequency_penalty", math.nan),
            ("seed", -1),
            ("seed", 2**63),
            ("min_tokens", -1),
            ("max_tokens", 0),
            ("logprobs", 21),
            ("logprobs", -2),
            ("stop_tokens", (1000,)),
            ("stop_tokens", tuple(range(1000)) * 2),
            ("logit_bias", ((-1, 1.0),)),
            ("logit_bias", ((1, math.nan),)),
            ("logit_bias", ((1, math.inf),)),
        ]
    },
}


@pytest.mark.parametrize("name", BAD_SEQUENCES)
def test_bad_sequence_fails_alone(runner: Runner, fake: ModuleType, name: str) -> None:
    step = Step(0, [], [BAD_SEQUENCES[name], seq(1, [1, 2])], [Go(0, 1, [0]), Go(1, 2, [1])])
    assert done(runner.step(step)) == [SlotToken(0, -1, "error"), SlotToken(1, fake.next_token([1, 2]))]
    # The slot can be used again once it is gone.
    assert len(done(runner.step(Step(1, [0], [seq(0, [3])], [Go(0, 1, [0])])))) == 1


@pytest.mark.parametrize(
    "go",
    [Go(0, 3, [0]), Go(0, 2, []), Go(0, 2, [64]), Go(0, 2, [-1]), Go(0, 2, [2**40]), Go(0, 2, [0] * 100)],
    ids=["more than known", "no block", "block too high", "negative block", "huge block", "too many blocks"],
)
def test_bad_go_fails_its_slot_alone(runner: Runner, fake: ModuleType, go: Go) -> None:
    step = Step(0, [], [seq(0, [1, 2]), seq(1, [1, 2])], [go, Go(1, 2, [1])])
    assert done(runner.step(step)) == [SlotToken(0, -1, "error"), SlotToken(1, fake.next_token([1, 2]))]


@pytest.mark.parametrize(
    "step",
    [
        Step(9, [16], [], []),
        Step(9, [-1], [], []),
        Step(9, [2**70], [], []),
        Step(9, [], [seq(16, [1])], []),
        Step(9, [], [seq(0, [1])], []),
        Step(9, [], [seq(1, [1]), seq(1, [1])], []),
        Step(9, [0], [], [Go(16, 1, [])]),
        Step(9, [0], [], [Go(0, 1, []), Go(0, 1, [])]),
        Step(9, [0], [], [Go(0, 0, [])]),
        Step(9, [0], [], [Go(0, -5, [])]),
        Step(9, [0], [], [Go(0, 65, [])]),
    ],
    ids=str,
)
def test_bad_step_is_a_fault_and_changes_nothing(runner: Runner, fake: ModuleType, step: Step) -> None:
    done(runner.step(Step(0, [], [seq(0, [1, 2])], [Go(0, 2, [0])])))
    answer = runner.step(step)
    assert isinstance(answer, Fault)
    assert (answer.n, answer.kind) == (9, "bad_step")
    known = [1, 2, fake.next_token([1, 2])]
    assert done(runner.step(Step(10, [], [], [Go(0, 1, [])])))[0].token == fake.next_token(known)


def test_an_urgent_step_in_the_middle_of_another(runner: Runner, fake: ModuleType) -> None:
    """Both draw what they would alone, and the seconds of one are not those of the other."""
    done(runner.step(Step(0, [], [seq(0, [1, 2]), seq(1, [3])], [Go(0, 2, [0]), Go(1, 1, [8])])))
    urgent = Step(2, [], [seq(2, [5, 6, 7])], [Go(2, 3, [16])], urgent=True)
    within: list[StepDone | Fault] = []

    def between() -> None:
        if not within:
            begin = time.perf_counter()
            while time.perf_counter() < begin + 0.02:
                pass
            runner._urgent_seconds += 0.01  # of another one
            within.append(runner.step(urgent))

    runner.between = between
    around = runner.step(Step(1, [], [], [Go(0, 1, []), Go(1, 1, [])]))
    assert isinstance(around, StepDone)
    assert around.seconds > 0.009
    assert done(within[0]) == [SlotToken(2, fake.next_token([5, 6, 7]))]
    first = fake.generate([1, 2], 2), fake.generate([3], 2)
    assert [t.token for t in around.tokens] == [tokens[1] for tokens in first]
    after = done(runner.step(Step(3, [], [], [Go(0, 1, []), Go(1, 1, []), Go(2, 1, [])])))
    expected = [fake.generate([1, 2], 3)[2], fake.generate([3], 3)[2], fake.generate([5, 6, 7], 2)[1]]
    assert [t.token for t in after] == expected


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (Step(9, [], [seq(2, [1])], [Go(2, 1, [16])]), "another step is in hand"),
        (Step(9, [], [], [Go(0, 1, [])], urgent=True), "slot 0 is in the step in hand"),
        (Step(9, [0], [], [], urgent=True), "slot 0 is in the step in hand"),
        (Step(9, [], [seq(2, [1] * 33)], [Go(2, 33, [])], urgent=True), "more than 32 tokens"),
    ],
    ids=str,
)
def test_what_an_urgent_step_may_not(runner: Runner, fake: ModuleType, step: Step, why: str) -> None:
    within: list[StepDone | Fault] = []
    runner.between = lambda: within.append(runner.step(step))
    assert len(done(runner.step(Step(0, [], [seq(0, [1, 2])], [Go(0, 2, [0])])))) == 1
    assert isinstance(within[0], Fault) and why in within[0].message


def test_unknown_slots_and_reset(runner: Runner) -> None:
    assert done(runner.step(Step(0, [5], [], [Go(3, 1, [9])]))) == []
    done(runner.step(Step(1, [], [seq(0, [1, 2])], [Go(0, 2, [0])])))
    runner.reset()
    assert done(runner.step(Step(2, [], [seq(0, [1, 2])], [Go(0, 1, [0])]))) == []


def test_position_is_absolute_and_unchanged_by_preemption(runner: Runner) -> None:
    done(runner.step(Step(0, [], [seq(0, [1, 2, 3], s=sampling(seed=7))], [Go(0, 3, [0])])))
    batch, drawn = runner._executor.batches[-1]
    assert drawn.position.tolist() == [3]
    assert drawn.seed.tolist() == [7]
    tokens = [1, 2, 3, 4, 5]
    done(runner.step(Step(1, [0], [seq(0, tokens, 3, s=sampling(seed=7))], [Go(0, 2, [0])])))
    batch, drawn = runner._executor.batches[-1]
    assert drawn.position.tolist() == batch.logit_rows.tolist() == []
    done(runner.step(Step(2, [], [], [Go(0, 3, [1])])))
    batch, drawn = runner._executor.batches[-1]
    assert drawn.position.tolist() == [5]
    assert batch.logit_rows.tolist() == [2]
    assert batch.context.tolist() == [2]


def test_arrays_of_a_mixed_step(runner: Runner) -> None:
    """History only for rows with penalties, bans until min_tokens, everything of the type that C++ reads."""
    sequences = [
        seq(0, [1, 2, 3]),
        seq(1, [1, 2, 3, 4], 2, s=sampling(repetition_penalty=1.2)),
        seq(2, [1, 2, 3, 4], 2, s=sampling(presence_penalty=0.5)),
        seq(3, [1, 2, 3, 4], 3, s=sampling(repetition_penalty=1.2, frequency_penalty=1, repetition_window=2)),
        seq(4, [1, 2, 3], s=sampling(logit_bias=((7, 2.5),), stop_tokens=(8, 9), min_tokens=1)),
        seq(5, [1, 2, 3], 2, s=sampling(stop_tokens=(8, 9), min_tokens=1)),
    ]
    going = [Go(s.slot, len(s.tokens), [s.slot]) for s in sequences]
    going[0] = Go(0, 2, [0])
    done(runner.step(Step(0, [], sequences, going)))
    batch, s = runner._executor.batches[-1]
    assert batch.starts.tolist() == [0, 2, 6, 10, 14, 17, 20]
    assert batch.logit_rows.tolist() == [5, 9, 13, 16, 19]
    assert batch.blocks.tolist() == [0, 1, 2, 3, 4, 5]
    assert s.history_starts.tolist() == [0, 4, 6, 8, 8, 8]
    assert s.history.tolist() == [1, 2, 3, 4, 3, 4, 3, 4]
    assert s.history_output.tolist() == [2, 0, 1, 0, 0]
    assert s.bias_starts.tolist() == [0, 0, 0, 0, 3, 3]
    assert s.bias_tokens.tolist() == [7, 8, 9]
    assert s.bias_values.tolist() == [2.5, -math.inf, -math.inf]
    for part in (batch, s):
        for name, array in vars(part).items():
            assert array.flags.c_contiguous, name
            kind = {"seed": np.int64, "position": np.int64}.get(name)
            floats = {"temperature", "top_p", "min_p", "repetition", "presence", "frequency", "bias_values"}
            assert array.dtype == (kind or (np.float32 if name in floats else np.int32)), name


def test_logprobs_are_as_asked(runner: Runner) -> None:
    sequences = [seq(i, [1, 2], s=sampling(logprobs=n)) for i, n in enumerate([-1, 0, 2])]
    answer = done(runner.step(Step(0, [], sequences, [Go(i, 2, [i]) for i in range(3)])))
    token = answer[0].token
    assert answer[0] == SlotToken(0, token)
    assert answer[1] == SlotToken(1, token, "", -0.5, [])
    assert answer[2] == SlotToken(2, token, "", -0.5, [(token, -1.5), (token + 1, -1.5)])


def test_overhead_of_a_step(fake: ModuleType) -> None:
    """Python of one decode step, for 1 and for 64 sequences, without the executor."""

    class Nothing(fake.FakeExecutor):  # type: ignore[misc, name-defined]
        def step(self, batch: Any, sampling: Any, between: Any = None) -> Any:
            return self.answer

    for n_seq in (1, 64):
        runner = make(fake, max_len=4000, max_sequences=64, max_batch_tokens=64 * 600, blocks=1024)
        runner._executor = executor = Nothing(1, BT)
        top = np.zeros((n_seq, 20), np.int32)
        ones = np.ones(n_seq, np.int32)
        executor.answer = fake.Drawn(ones, ones.astype(np.float32), top, top.astype(np.float32))
        new = [seq(slot, [1] * 600, s=sampling(max_tokens=3000)) for slot in range(n_seq)]
        blocks = list(range(300))
        done(runner.step(Step(0, [], new, [Go(s.slot, 600, blocks) for s in new])))
        seconds = []
        for n in range(200):
            step = Step(n, [], [], [Go(slot, 1, []) for slot in range(n_seq)])
            begin = time.perf_counter()
            assert len(done(runner.step(step))) == n_seq
            seconds.append(time.perf_counter() - begin)
        print(f"{n_seq} sequences: {sorted(seconds)[100] * 1e6:.0f} us")
        assert min(seconds) < 1e-3


# ---- models with states


class StatefulExecutor:
    """The fake's, with a state in each slot: the tokens so far."""

    urgent_tokens = 0

    def __init__(self, fake: ModuleType) -> None:
        self.inner = fake.FakeExecutor(64, BT)
        self.block_tokens, self.state_slots = BT, 12
        self.states: dict[int, list[int]] = {}
        self.fails = False

    def copy_state(self, source: int, target: int) -> None:
        self.states[target] = list(self.states[source])

    def step(self, batch: Any, sampling: Any, between: Any) -> Any:
        if self.fails:
            raise RuntimeError("in the middle")
        for s, slot in enumerate(batch.slots.tolist()):
            tokens = batch.tokens[batch.starts[s] : batch.starts[s + 1]].tolist()
            before = self.states[slot] if batch.context[s] else []
            assert len(before) == batch.context[s]
            self.states[slot] = before + tokens
            if batch.keep_slots[s] >= 0:
                self.states[int(batch.keep_slots[s])] = self.states[slot][: batch.keep_at[s]]
        return self.inner.step(batch, sampling)


def stateful(fake: ModuleType) -> tuple[Runner, StatefulExecutor]:
    executor = StatefulExecutor(fake)
    sizes = {"blocks": 64, "max_len": 80, "max_sequences": 8, "max_batch_tokens": 64}
    limits = Limits(**sizes, block_tokens=BT, vocab=1000, kept_states=4)
    return Runner(executor, limits), executor  # type: ignore[arg-type]


def test_a_sequence_begins_with_the_state_that_another_kept(fake: ModuleType) -> None:
    runner, executor = stateful(fake)
    prompt = list(range(10, 20))
    first = done(runner.step(Step(0, [], [seq(0, prompt)], [Go(0, 10, [0, 1, 2], keep=3, keep_at=8)])))
    assert executor.states[8 + 3] == prompt[:8] and executor.states[0] == prompt
    new = msgspec.structs.replace(seq(5, prompt, computed=8), state=3)
    # The copy that it begins with is replaced in the same step, after it was read.
    again = done(runner.step(Step(1, [0], [new], [Go(5, 1, [0, 1, 9], keep=3, keep_at=9)])))
    assert not again and executor.states[5] == executor.states[8 + 3] == prompt[:9]
    again = done(runner.step(Step(2, [], [], [Go(5, 1, [])])))
    assert again[0].token == first[0].token


@pytest.mark.parametrize("state", [-1, 4, -2])
def test_a_hit_without_its_state_ends_that_sequence(fake: ModuleType, state: int) -> None:
    runner, _ = stateful(fake)
    new = msgspec.structs.replace(seq(5, list(range(10)), computed=8), state=state)
    answer = done(runner.step(Step(0, [], [new, seq(1, [1, 2])], [Go(1, 2, [3])])))
    assert [(token.slot, token.finish) for token in answer] == [(5, "error"), (1, "")]


@pytest.mark.parametrize(("keep", "keep_at"), [(0, 0), (0, 7), (0, -1)])
def test_a_state_that_is_not_reached_ends_that_sequence(fake: ModuleType, keep: int, keep_at: int) -> None:
    runner, _ = stateful(fake)
    going = [Go(0, 6, [0, 1], keep=keep, keep_at=keep_at), Go(1, 2, [3])]
    answer = done(runner.step(Step(0, [], [seq(0, list(range(10))), seq(1, [1, 2])], going)))
    assert [(token.slot, token.finish) for token in answer] == [(0, "error"), (1, "")]


def test_places_that_do_not_exist_or_are_named_twice_are_faults(fake: ModuleType, runner: Runner) -> None:
    new = [seq(0, [1, 2, 3, 4]), seq(1, [1, 2, 3, 4])]
    for keeps in ((4, -1), (-2, -1), (1, 1)):
        going = [Go(slot, 4, [slot], keep=keep, keep_at=4) for slot, keep in enumerate(keeps)]
        assert isinstance(stateful(fake)[0].step(Step(0, [], new, going)), Fault)
    assert isinstance(runner.step(Step(0, [], new, [Go(0, 4, [0], keep=0, keep_at=4)])), Fault)
    entering = msgspec.structs.replace(seq(0, [1, 2]), state=0)
    assert done(runner.step(Step(1, [], [entering], [])))[0].finish == "error"


def test_a_step_that_broke_off_is_not_repeated_with_states_that_it_changed(fake: ModuleType) -> None:
    runner, executor = stateful(fake)
    executor.fails = True
    answer = done(runner.step(Step(0, [], [seq(0, [1]), seq(1, [2])], [Go(0, 1, [0]), Go(1, 1, [1])])))
    assert [(token.slot, token.finish) for token in answer] == [(0, "error"), (1, "error")]
