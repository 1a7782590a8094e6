"""The sampling parameters of all slots, as columns: a step's SamplingBatch is then a few numpy gathers.

Drawing itself is C++ (`_kernels.sample`); here is only the bookkeeping of who draws how.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ktransformers.engine.batch import F32, I32, MAX_LOGPROBS, SamplingBatch
from ktransformers.engine.protocol import Sampling

MAX_BIAS = 1024
"""Most entries of one logit_bias, and most stop tokens of one sequence."""

MOST_BIAS = 1e6
_LEAST = float(np.finfo(np.float32).tiny)
"""Smallest share that kernels take for top_p; as all below it, it keeps the likeliest token alone."""
_NO_TOKENS = np.empty(0, np.int32)
_NO_VALUES = np.empty(0, np.float32)


def check_sampling(sampling: Sampling, vocab: int) -> None:
    """Refuse what a kernel could choke on. The API has stricter bounds; these hold whoever calls.

    Errors: ValueError that names the parameter.
    """
    bounds = {
        "temperature": (0.0, 100.0),
        "top_p": (0.0, 1.0),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (1e-3, 1e3),
        "presence_penalty": (-1e3, 1e3),
        "frequency_penalty": (-1e3, 1e3),
        "top_k": (0, 2**31 - 1),
        "repetition_window": (0, 2**31 - 1),
        "seed": (0, 2**63 - 1),
        "min_tokens": (0, 2**31 - 1),
        "max_tokens": (1, 2**31 - 1),
        "logprobs": (-1, MAX_LOGPROBS),
    }
    for name, (low, high) in bounds.items():
        if not low <= getattr(sampling, name) <= high:  # false for NaN, too
            raise ValueError(f"{name} must be between {low} and {high}")
    if max(len(sampling.logit_bias), len(sampling.stop_tokens)) > MAX_BIAS:
        raise ValueError(f"logit_bias and stop_tokens may have {MAX_BIAS} entries")
    if not all(0 <= token < vocab for token in sampling.stop_tokens):
        raise ValueError("stop_tokens must be in the vocabulary")
    for token, value in sampling.logit_bias:
        if not 0 <= token < vocab:
            raise ValueError("logit_bias must be of tokens in the vocabulary")
        if not (abs(value) <= MOST_BIAS or value == -math.inf):
            raise ValueError(f"logit_bias must be within {MOST_BIAS:g} of 0, or -inf")


@dataclass(frozen=True)
class _Drawers:
    """What stays as it is while the same slots draw, step after step."""

    slots: bytes
    columns: dict[str, npt.NDArray[Any]]
    """Of SamplingBatch."""
    penalised: list[int]
    """Rows that have a penalty."""
    biased: list[int]


class SamplingTable:
    """One row for each slot. A row is valid from `put` on, and stays until the next `put`."""

    def __init__(self, slots: int) -> None:
        self._drawers = _Drawers(b"", {}, [], [])
        self._temperature = np.zeros(slots, np.float32)
        self._top_k = np.zeros(slots, np.int32)
        self._top_p = np.zeros(slots, np.float32)
        self._min_p = np.zeros(slots, np.float32)
        self._repetition = np.zeros(slots, np.float32)
        self._presence = np.zeros(slots, np.float32)
        self._frequency = np.zeros(slots, np.float32)
        self._seed = np.zeros(slots, np.int64)
        self._logprobs = np.zeros(slots, np.int32)
        self._window = np.zeros(slots, np.int32)
        self._min_tokens = np.zeros(slots, np.int32)
        self._penalised = np.zeros(slots, np.bool_)
        self._biased = np.zeros(slots, np.bool_)
        self._bias: list[tuple[I32, F32]] = [(_NO_TOKENS, _NO_VALUES)] * slots
        self._bans: list[tuple[I32, F32]] = [(_NO_TOKENS, _NO_VALUES)] * slots

    def put(self, slot: int, sampling: Sampling) -> None:
        """Set the row of `slot`; the parameters have been checked."""
        self._drawers = _Drawers(b"", {}, [], [])
        s = sampling
        self._temperature[slot] = s.temperature
        self._top_k[slot] = s.top_k
        self._top_p[slot] = max(s.top_p, _LEAST)
        self._min_p[slot] = s.min_p
        self._repetition[slot] = s.repetition_penalty
        self._presence[slot] = s.presence_penalty
        self._frequency[slot] = s.frequency_penalty
        self._seed[slot] = s.seed
        self._logprobs[slot] = s.logprobs
        self._window[slot] = s.repetition_window
        self._min_tokens[slot] = s.min_tokens
        self._penalised[slot] = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1, 0, 0)
        self._bias[slot] = _bias_arrays(s.logit_bias)
        # Until min_tokens are out a stop token cannot be drawn: its logit is -inf.
        bans = s.stop_tokens if s.min_tokens else ()
        self._bans[slot] = _bias_arrays((token, -math.inf) for token in bans)
        self._biased[slot] = bool(s.logit_bias or bans)

    def batch(self, slots: I32, tokens: I32, length: I32, n_prompt: I32) -> SamplingBatch:
        """The draws of `slots` [R], each of the token at position length[r].

        `tokens` [slots, max_len] holds every slot's tokens; n_prompt[r] of row r's are its prompt.
        """
        if not self._drawers.columns or self._drawers.slots != slots.tobytes():
            self._drawers = self._gather(slots)
        history_starts, history, history_output = self._histories(slots, tokens, length, n_prompt)
        bias_starts, bias_tokens, bias_values = self._biases(slots, length, n_prompt)
        return SamplingBatch(
            **self._drawers.columns,
            position=length.astype(np.int64),
            history_starts=history_starts,
            history=history,
            history_output=history_output,
            bias_starts=bias_starts,
            bias_tokens=bias_tokens,
            bias_values=bias_values,
        )

    def _gather(self, slots: I32) -> _Drawers:
        columns: dict[str, npt.NDArray[Any]] = {
            "temperature": self._temperature[slots],
            "top_k": self._top_k[slots],
            "top_p": self._top_p[slots],
            "min_p": self._min_p[slots],
            "repetition": self._repetition[slots],
            "presence": self._presence[slots],
            "frequency": self._frequency[slots],
            "seed": self._seed[slots],
            "logprobs": self._logprobs[slots],
        }
        penalised, biased = (np.flatnonzero(having[slots]) for having in (self._penalised, self._biased))
        return _Drawers(slots.tobytes(), columns, penalised.tolist(), biased.tolist())

    def _histories(self, slots: I32, tokens: I32, length: I32, n_prompt: I32) -> tuple[I32, I32, I32]:
        starts = np.zeros(len(slots) + 1, np.int32)
        output = np.zeros(len(slots), np.int32)
        parts: list[I32] = []
        if not self._drawers.penalised:
            return starts, _NO_TOKENS, output
        sizes = np.zeros(len(slots), np.int32)
        for row in self._drawers.penalised:
            slot, end, prompt = slots[row], int(length[row]), int(n_prompt[row])
            window = int(self._window[slot])
            begin = max(end - window, 0) if window else 0
            if self._repetition[slot] == 1.0:
                begin = max(begin, prompt)  # the prompt counts for repetition only
            parts.append(tokens[slot, begin:end])
            sizes[row] = end - begin
            output[row] = max(prompt - begin, 0)
        np.cumsum(sizes, out=starts[1:])
        return starts, np.concatenate(parts), output

    def _biases(self, slots: I32, length: I32, n_prompt: I32) -> tuple[I32, I32, F32]:
        starts = np.zeros(len(slots) + 1, np.int32)
        if not self._drawers.biased:
            return starts, _NO_TOKENS, _NO_VALUES
        parts: list[tuple[I32, F32]] = []
        sizes = np.zeros(len(slots), np.int32)
        for row in self._drawers.biased:
            slot = slots[row]
            mine = [self._bias[slot]]
            if length[row] - n_prompt[row] < self._min_tokens[slot]:
                mine.append(self._bans[slot])
            sizes[row] = sum(len(ids) for ids, _ in mine)
            parts += mine
        np.cumsum(sizes, out=starts[1:])
        return starts, np.concatenate([ids for ids, _ in parts]), np.concatenate([v for _, v in parts])


def _bias_arrays(pairs: Iterable[tuple[int, float]]) -> tuple[I32, F32]:
    listed = list(pairs)
    return np.array([t for t, _ in listed], np.int32), np.array([v for _, v in listed], np.float32)
