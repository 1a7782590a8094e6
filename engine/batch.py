"""One step's input to an executor, as flat arrays, and what comes back."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]

MAX_LOGPROBS = 20
URGENT_TOKENS = 256
"""Most tokens of an urgent step, whose values take memory of their own."""


def _none() -> I32:
    return np.zeros(0, np.int32)


@dataclass(frozen=True)
class Batch:
    """T tokens of S sequences; token t of sequence s stands at position context[s] + t - starts[s]."""

    tokens: I32
    """[T]"""
    starts: I32
    """[S + 1] where each sequence's tokens begin"""
    context: I32
    """[S] tokens whose KV is in the cache already"""
    block_starts: I32
    """[S + 1] where each sequence's block table begins in `blocks`"""
    blocks: I32
    """Block ids, by position; each table covers context[s] + its tokens of this step"""
    logit_rows: I32
    """[R] ascending indices into tokens: the rows that draw a token"""
    slots: I32 = field(default_factory=_none)
    """[S] where the state of each sequence is, read and replaced (with context 0 it begins as zeros); empty,
    as are the next two, for a program without state. All slots that are written differ."""
    keep_slots: I32 = field(default_factory=_none)
    """[S] where a copy of the state goes, or -1"""
    keep_at: I32 = field(default_factory=_none)
    """[S] that copy is of the state after so many tokens of the sequence: context < keep_at <= context + its
    tokens of this step"""


@dataclass(frozen=True)
class SamplingBatch:
    """Parameters of the R draws (see engine.protocol.Sampling), one array a parameter: one C++ call does them
    all."""

    temperature: F32
    top_k: I32
    top_p: F32
    min_p: F32
    repetition: F32
    presence: F32
    frequency: F32
    seed: I64
    position: I64
    """Absolute position of the token being drawn: the random number is philox(seed, position)."""
    logprobs: I32
    """-1 .. 20"""
    history_starts: I32
    """[R + 1] ranges in `history`; empty when a row has no penalty"""
    history: I32
    history_output: I32
    """[R] where the output begins within the row's history (presence and frequency count from there)"""
    bias_starts: I32
    """[R + 1] ranges in `bias_tokens` and `bias_values`; -inf bans a token"""
    bias_tokens: I32
    bias_values: F32


@dataclass(frozen=True)
class Drawn:
    """R drawn tokens."""

    token: I32
    """[R]; -1 where the logits were not finite"""
    logprob: F32
    """[R] of the raw distribution"""
    top_tokens: I32
    """[R, MAX_LOGPROBS], likeliest first; -1 beyond what was asked for"""
    top_logprobs: F32


class Executor(Protocol):
    """Runs a program. Owns the packed weights, the KV pool and the states."""

    isa: str
    blocks: int
    block_tokens: int
    weights_digest: tuple[int, ...]
    """64 bits of all bytes of each weight, in whatever layout the executor has them."""

    state_slots: int
    """Places for the states of sequences; 0: the program has none."""

    @property
    def block_bytes(self) -> int:
        """Bytes of the KV of one block, all layers."""
        ...

    urgent_tokens: int
    """Of the largest batch that `urgent_step` takes; 0: there are none, and `between` is not called."""

    def step(
        self, batch: Batch, sampling: SamplingBatch, between: Callable[[], None] | None = None
    ) -> Drawn:
        """Compute all tokens of the batch, write their KV, draw one token for each logit row.

        `between` is called every few milliseconds in the middle of it, in this thread.
        """
        ...

    def urgent_step(self, batch: Batch, sampling: SamplingBatch) -> Drawn:
        """A small step, which `between` may do: other blocks than those that the step around it uses."""
        ...

    def logits(self, batch: Batch) -> F32:
        """The same step, but give the logits [R, vocab] instead of drawing (tests, scoring)."""
        ...

    def read_block(self, block: int, into: U8) -> None:
        """Copy the KV of one block to `into` [block_bytes]. ValueError when there is no such block.

        Called by other threads beside a step, which does not write that block; the GIL is released.
        """
        ...

    def write_block(self, block: int, data: U8) -> None:
        """Replace the KV of one block by `data` [block_bytes], read from an executor of the same fingerprint.

        As read_block; no step that runs beside it uses that block.
        """
        ...

    def copy_state(self, source: int, target: int) -> None:
        """The state in slot `target` becomes that in `source`. ValueError when there is no such slot. Not
        beside a step."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...
