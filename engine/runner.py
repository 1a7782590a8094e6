"""The slots of one engine: a Step goes in, a batch is computed, a StepDone comes out.

Slots are columns of arrays, so that making a batch of 64 decoding sequences costs about as much as of one.
Everything that the scheduler says is checked here before an executor sees it. What is wrong with one
sequence ends that sequence with finish "error"; what is wrong with a step as a whole is a Fault, and none
of it is done.
"""

import logging
import time
from collections.abc import Callable, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ktransformers.engine.batch import F32, I32, Batch, Drawn, Executor
from ktransformers.engine.protocol import (
    Fault,
    Go,
    NewSeq,
    SlotToken,
    Step,
    StepDone,
    slots_for,
)
from ktransformers.engine.sampler import SamplingTable, check_sampling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one engine can hold; see engine.protocol.Ready."""

    blocks: int
    block_tokens: int
    max_len: int
    max_sequences: int
    max_batch_tokens: int
    vocab: int
    kept_states: int = -1


class StepError(ValueError):
    """The step as a whole cannot be done."""


class Runner:
    """All sequences in their slots, and the executor that computes them.

    An urgent step may come in the middle of another one (`between`): slots are rows of their own, so it
    leaves what the other has in hand alone.
    """

    def __init__(self, executor: Executor, limits: Limits, arriving: Set[int] = frozenset()) -> None:
        """`arriving` are blocks that no sequence may have now: what they will hold is still being written."""
        self.steps = 0
        self.between: Callable[[], None] | None = None
        """Called every few milliseconds in the middle of a step; may do urgent ones."""
        self._in_hand: set[int] | None = None
        """Slots of the step that is being done."""
        self._urgent_seconds = 0.0
        self._arriving = arriving
        self._executor = executor
        self._limits = limits
        self._slots = slots_for(limits.max_sequences, executor.urgent_tokens)
        slots, table = self._slots, -(-limits.max_len // limits.block_tokens)
        # Row = slot. Zeroed pages are not touched until a sequence needs them.
        self._tokens: I32 = np.zeros((slots, limits.max_len), np.int32)
        self._blocks: I32 = np.zeros((slots, table), np.int32)
        self._length: I32 = np.zeros(slots, np.int32)
        self._n_prompt: I32 = np.zeros(slots, np.int32)
        self._computed: I32 = np.zeros(slots, np.int32)
        self._n_blocks: I32 = np.zeros(slots, np.int32)
        self._keep: I32 = np.full(slots, -1, np.int32)
        """Go.keep of the step in hand, and Go.keep_at."""
        self._keep_at: I32 = np.zeros(slots, np.int32)
        self._live: npt.NDArray[np.bool_] = np.zeros(slots, np.bool_)
        self._occupied: set[int] = set()
        """Slots from NewSeq to gone: live, or finished and ignoring every Go."""
        self._sampling = SamplingTable(slots)
        self._limit: list[int] = [0] * slots
        """Length at which a slot's sequence ends."""
        self._stops: list[frozenset[int]] = [frozenset()] * slots

    def reset(self) -> None:
        """Forget every sequence (another scheduler has come)."""
        self._live[:] = False
        self._occupied.clear()

    def step(self, step: Step) -> StepDone | Fault:
        """Do one step. Never raises for what the scheduler or a sequence did wrong."""
        begin, urgent = time.perf_counter(), self._urgent_seconds
        try:
            self._check(step)
        except StepError as error:
            return Fault(step.n, "bad_step", str(error))
        around = self._in_hand
        self._in_hand = {go.slot for go in step.go_on}
        try:
            tokens, computed = self._do(step, within=around is not None)
        finally:
            self._in_hand = around
        self.steps += 1
        seconds = time.perf_counter() - begin - (self._urgent_seconds - urgent)
        if around is not None:
            self._urgent_seconds += seconds
        return StepDone(step.n, tokens, seconds, computed)

    def _do(self, step: Step, within: bool) -> tuple[list[SlotToken], int]:
        """What was drawn, and how many tokens were computed."""
        for slot in step.gone:
            self._live[slot] = False
            self._occupied.discard(slot)
        tokens = self._enter(step.new)
        slots, n_tokens, failed = self._go_on(step.go_on)
        tokens += failed
        if len(slots):
            tokens += self._compute(slots, n_tokens, within)
        return tokens, int(n_tokens.sum())

    # ---- what the scheduler says

    def _check(self, step: Step) -> None:
        entering = [new.slot for new in step.new]
        going = [go.slot for go in step.go_on]
        last = self._slots - 1
        for name, slots in (("gone", step.gone), ("new", entering), ("go_on", going)):
            if slots and not (min(slots) >= 0 and max(slots) <= last):
                raise StepError(f"{name}: slots are 0 to {last}")
            if len(set(slots)) != len(slots):
                raise StepError(f"{name}: a slot is named twice")
        if taken := self._occupied.difference(step.gone).intersection(entering):
            raise StepError(f"new: slot {min(taken)} is occupied")
        if any(go.n_tokens < 1 for go in step.go_on):
            raise StepError("go_on: n_tokens must be at least 1")
        if len(step.go_on) > self._limits.max_sequences:
            raise StepError(f"go_on: more than {self._limits.max_sequences} sequences")
        most = self._executor.urgent_tokens if step.urgent else self._limits.max_batch_tokens
        if sum(go.n_tokens for go in step.go_on) > most:
            raise StepError(f"go_on: more than {most} tokens")
        kept = [go.keep for go in step.go_on if go.keep != -1]
        if kept and not (min(kept) >= 0 and max(kept) < self._limits.kept_states):
            raise StepError(f"go_on: there are {max(self._limits.kept_states, 0)} places for states")
        if len(set(kept)) != len(kept):
            raise StepError("go_on: a place for a state is named twice")
        if self._in_hand is not None:
            self._check_within(step, self._in_hand)

    def _check_within(self, step: Step, in_hand: set[int]) -> None:
        if not step.urgent:
            raise StepError("another step is in hand")
        named = {*step.gone, *(new.slot for new in step.new), *(go.slot for go in step.go_on)}
        if common := in_hand & named:
            raise StepError(f"slot {min(common)} is in the step in hand")

    def _enter(self, entering: list[NewSeq]) -> list[SlotToken]:
        failed = []
        for new in entering:
            self._occupied.add(new.slot)
            try:
                self._put(new)
            except ValueError as error:
                failed.append(self._fail(new.slot, str(error)))
        return failed

    def _put(self, new: NewSeq) -> None:
        length, slot = len(new.tokens), new.slot
        if not 1 <= new.n_prompt <= length < self._limits.max_len:
            raise ValueError(f"{length} tokens, {new.n_prompt} of prompt; at most {self._limits.max_len}")
        if not 0 <= new.computed < length or new.computed % self._limits.block_tokens:
            raise ValueError(f"{new.computed} of {length} tokens cannot have been computed")
        if min(new.tokens) < 0 or max(new.tokens) >= self._limits.vocab:
            raise ValueError(f"tokens are 0 to {self._limits.vocab - 1}")
        check_sampling(new.sampling, self._limits.vocab)
        limit = min(new.n_prompt + new.sampling.max_tokens, self._limits.max_len)
        if length >= limit:
            raise ValueError(f"all {new.sampling.max_tokens} tokens are there already")
        self._begin_state(new)
        self._tokens[slot, :length] = new.tokens
        self._length[slot] = length
        self._n_prompt[slot] = new.n_prompt
        self._computed[slot] = new.computed
        self._n_blocks[slot] = 0
        self._limit[slot] = limit
        self._stops[slot] = frozenset(new.sampling.stop_tokens)
        self._sampling.put(slot, new.sampling)
        self._live[slot] = True

    def _begin_state(self, new: NewSeq) -> None:
        kept = self._limits.kept_states
        if kept >= 0 and new.computed:
            if not 0 <= new.state < kept:
                raise ValueError(f"{new.computed} tokens are computed, and their state is not kept")
            self._executor.copy_state(self._limits.max_sequences + new.state, new.slot)
        elif new.state != -1:
            raise ValueError("a state of no tokens, or of a model without states")

    def _go_on(self, going: list[Go]) -> tuple[I32, I32, list[SlotToken]]:
        """The slots that are computed now, how many tokens of each, and those that failed."""
        failed = []
        for go in going:
            self._keep[go.slot], self._keep_at[go.slot] = go.keep, go.keep_at
            if go.new_blocks and self._live[go.slot]:
                try:
                    self._append_blocks(go.slot, go.new_blocks)
                except ValueError as error:
                    failed.append(self._fail(go.slot, str(error)))
        slots = np.array([go.slot for go in going], np.int32)
        n_tokens = np.array([go.n_tokens for go in going], np.int32)
        live = self._live[slots]
        if not live.all():  # some finished before the scheduler could know
            slots, n_tokens = slots[live], n_tokens[live]
        until = self._computed[slots] + n_tokens
        good = (until <= self._length[slots]) & (until <= self._n_blocks[slots] * self._limits.block_tokens)
        if self._limits.kept_states >= 0:
            keep_at = self._keep_at[slots]
            good &= (self._keep[slots] < 0) | ((keep_at > self._computed[slots]) & (keep_at <= until))
        if not good.all():
            for row in np.flatnonzero(~good):
                slot = int(slots[row])
                have = int(self._n_blocks[slot]) * self._limits.block_tokens
                reason = f"go on to {until[row]}: has {self._length[slot]} tokens and room for {have}"
                if self._keep[slot] >= 0:
                    reason += f", or keeps no state after {self._keep_at[slot]}"
                failed.append(self._fail(slot, reason))
            slots, n_tokens = slots[good], n_tokens[good]
        return slots, n_tokens, failed

    def _append_blocks(self, slot: int, blocks: list[int]) -> None:
        begin = int(self._n_blocks[slot])
        end = begin + len(blocks)
        if end > self._blocks.shape[1]:
            raise ValueError(f"{end} blocks are more than the longest sequence needs")
        if min(blocks) < 0 or max(blocks) >= self._limits.blocks:
            raise ValueError(f"blocks are 0 to {self._limits.blocks - 1}")
        if self._arriving and not self._arriving.isdisjoint(blocks):
            raise ValueError("a block is still being copied from another tier")
        self._blocks[slot, begin:end] = blocks
        self._n_blocks[slot] = end

    def _fail(self, slot: int, reason: str) -> SlotToken:
        log.warning("slot %d fails: %s", slot, reason)
        self._live[slot] = False
        return SlotToken(slot, -1, "error")

    # ---- the batch

    def _compute(self, slots: I32, n_tokens: I32, within: bool) -> list[SlotToken]:
        """Compute the next n_tokens of each slot, draw, and take note."""
        until = self._computed[slots] + n_tokens
        drawing = until == self._length[slots]
        batch = self._batch(slots, n_tokens, until, drawing)
        drawers = slots[drawing]
        lengths = self._length[drawers]
        sampling = self._sampling.batch(drawers, self._tokens, lengths, self._n_prompt[drawers])
        try:
            if within:
                drawn = self._executor.urgent_step(batch, sampling)
            else:
                drawn = self._executor.step(batch, sampling, self.between)
        except Exception as error:
            # One sequence must not fail the others: halve until it stands alone. A step can be repeated,
            # since it writes the same KV to the same places. Not so states, unless nothing was done yet.
            stateful = self._limits.kept_states >= 0 and not isinstance(error, ValueError)
            if len(slots) == 1 or stateful:
                return [self._fail(slot, f"{type(error).__name__}: {error}") for slot in slots.tolist()]
            half = len(slots) // 2
            first = self._compute(slots[:half], n_tokens[:half], within)
            return first + self._compute(slots[half:], n_tokens[half:], within)
        self._computed[slots] = until
        return self._take(drawers, lengths, sampling.logprobs, drawn)

    def _batch(self, slots: I32, n_tokens: I32, until: I32, drawing: npt.NDArray[np.bool_]) -> Batch:
        starts, tokens = _ragged(self._tokens, slots, until - n_tokens, n_tokens)
        n_blocks = -(-until // self._limits.block_tokens)
        block_starts, blocks = _ragged(self._blocks, slots, np.zeros_like(slots), n_blocks)
        none = slots[:0]
        keep, has_states = self._keep[slots], self._limits.kept_states >= 0
        return Batch(
            tokens=tokens,
            starts=starts,
            context=until - n_tokens,
            block_starts=block_starts,
            blocks=blocks,
            logit_rows=starts[1:][drawing] - np.int32(1),
            slots=slots if has_states else none,
            keep_slots=np.where(keep < 0, keep, self._limits.max_sequences + keep) if has_states else none,
            keep_at=self._keep_at[slots] if has_states else none,
        )

    def _take(self, slots: I32, lengths: I32, logprobs: I32, drawn: Drawn) -> list[SlotToken]:
        """Append the drawn tokens to their slots, and see who has finished."""
        # That of a row which failed, too: its slot is not read again.
        self._tokens[slots, lengths] = drawn.token
        self._length[slots] = lengths + 1
        news = []
        columns = (slots, lengths, drawn.token, drawn.logprob, logprobs)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for row, (slot, length, token, logprob, top_n) in enumerate(rows):
            finish = self._finish(slot, length + 1, token)
            if finish:
                self._live[slot] = False
            if top_n < 0 or token < 0:
                news.append(SlotToken(slot, token, finish))
            else:
                top = _top(drawn.top_tokens[row, :top_n], drawn.top_logprobs[row, :top_n])
                news.append(SlotToken(slot, token, finish, logprob, top))
        return news

    def _finish(self, slot: int, length: int, token: int) -> str:
        if token < 0:
            return "error"
        if token in self._stops[slot]:
            return "stop"
        return "length" if length >= self._limit[slot] else ""


def _ragged(table: I32, rows: I32, begins: I32, counts: I32) -> tuple[I32, I32]:
    """Pieces [begins[i], begins[i] + counts[i]) of table[rows[i]], end to end: starts [n + 1], and all."""
    if len(rows) == 1:  # one stream waits for every microsecond of this
        begin, count = int(begins[0]), int(counts[0])
        return np.array([0, count], np.int32), table[rows[0], begin : begin + count].copy()
    starts = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    columns = np.arange(starts[-1], dtype=np.int32) + np.repeat(begins - starts[:-1], counts)
    return starts, table[np.repeat(rows, counts), columns]


def _top(tokens: I32, logprobs: F32) -> list[tuple[int, float]]:
    return [(t, p) for t, p in zip(tokens.tolist(), logprobs.tolist(), strict=True) if t >= 0]
