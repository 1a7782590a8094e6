"""How long a step will take, learnt from those that were measured; and how much prompt fits into a time.

    seconds = a0 + a1*prompt + a2*decodes + a3*context + a4*prompt*its context

by recursive least squares with slow forgetting. Pure: steps and times go in, predictions come out.
"""

import math
from operator import mul
from typing import NamedTuple

WARM_STEPS, WARM_PROMPTS = 12, 4
"""Nothing is predicted before so many steps were seen, and so many with a chunk of a prompt."""
LEAST_CHUNK = 16
"""A prompt always gets on by so much, whatever the decodes take."""
MOST_CHUNK = 2048
FIRST_CHUNK = 64
"""Of an engine of which nothing is known."""
HURRY, PAUSE = 1 / 8, 1 / 2
"""Of the time that a step may take: while somebody is about who should not have to wait for long steps; and a
step without the streams, for the prompt of such a one."""
EMPTY_STEPS = 12
"""What a step takes anyhow is not more than one in so many parts of it."""
_SCALES = (1.0, 1 / 256, 1 / 16, 1 / 4096, 1 / (1 << 20))
"""So that all features are about 1: the matrix stays well conditioned."""
_FORGET = 0.998
_DOUBT = 1e3
_MOST_DOUBT = 1e6


class Features(NamedTuple):
    """Of one step."""

    prompt: int = 0
    """Tokens of prompts."""
    decodes: int = 0
    context: int = 0
    """Tokens before the decodes, summed."""
    prompt_context: float = 0.0
    """Of each prompt token the tokens before it, summed."""

    def scaled(self) -> tuple[float, float, float, float, float]:
        """As the model takes them."""
        _, prompt, decodes, context, crossed = _SCALES
        return (
            1.0,
            self.prompt * prompt,
            self.decodes * decodes,
            self.context * context,
            self.prompt_context * crossed,
        )


class StepTime:
    """The model of one engine; a new engine gets a new one."""

    def __init__(self) -> None:
        n = len(_SCALES)
        self.steps = 0
        self._prompts = 0
        self._slowest = 0.0
        """Seconds for each token, in steps with a chunk."""
        self._weights = [0.0] * n
        self._doubt = [[_DOUBT * (i == j) for j in range(n)] for i in range(n)]

    @property
    def warm(self) -> bool:
        """Whether predictions mean something."""
        return self.steps >= WARM_STEPS and self._prompts >= WARM_PROMPTS

    def cautious(self, seconds: float) -> int:
        """Prompt tokens that will hardly take longer, by those few that were measured."""
        return int(seconds / self._slowest) if self._slowest else FIRST_CHUNK

    def observe(self, features: Features, seconds: float) -> None:
        """A step took so long."""
        x, p = features.scaled(), self._doubt
        px = [sum(map(mul, row, x)) for row in p]
        scale = _FORGET + sum(map(mul, x, px))
        error = seconds - sum(map(mul, self._weights, x))
        self._weights = [w + gain * error / scale for w, gain in zip(self._weights, px, strict=True)]
        # A direction that is not seen for long would otherwise be forgotten without end.
        forget = _FORGET if sum(row[i] for i, row in enumerate(p)) < _MOST_DOUBT else 1.0
        self._doubt = [
            [(doubt - gain * other / scale) / forget for doubt, other in zip(row, px, strict=True)]
            for row, gain in zip(p, px, strict=True)
        ]
        self.steps += 1
        if features.prompt >= LEAST_CHUNK:
            self._prompts += 1
            self._slowest = max(self._slowest, seconds / features.prompt)

    def predict(self, features: Features) -> float:
        """Seconds; never less than 0."""
        seconds: float = sum(map(mul, self._weights, features.scaled()))
        return max(0.0, seconds)

    def prompt_token(self, context: float) -> float:
        """Seconds that one more prompt token takes with so many before it."""
        _, prompt, _, _, crossed = (w * s for w, s in zip(self._weights, _SCALES, strict=True))
        return max(0.0, prompt) + max(0.0, crossed) * context

    def prompt_seconds(self, start: int, n: int) -> float | None:
        """Seconds that `n` prompt tokens after `start` others take; None while it knows nothing."""
        return n * self.prompt_token(start + n / 2) if self.warm else None


class Chunking:
    """How many prompt tokens the step being planned may take.

    With streams it may last `slo` seconds. Without, nobody notices: then it is long enough that what a step
    takes anyhow is a small part of it. While somebody is about who asks seldom (`hurry`) it is much shorter,
    so that who comes next does not wait for it, but what a step takes anyhow stays a twelfth, and prompts
    get as much of it as the streams do: if steps cannot be interrupted. With an `slo` of 0 there is no limit.
    """

    def __init__(self, model: StepTime, slo: float, interruptible: bool) -> None:
        self._model = model
        self._slo = slo
        self._interruptible = interruptible
        self._left: float | None = None
        self._most = MOST_CHUNK
        self._least = LEAST_CHUNK
        self._taken = 0

    @property
    def longest_pause(self) -> float:
        """Seconds that streams may sit out."""
        return self._slo * PAUSE if self._slo > 0 else math.inf

    def pause(self, seconds: float) -> None:
        """A step without the streams, of so many seconds at most, which they are to notice little of."""
        self.begin(Features())
        if self._left is not None:
            self._left = min(self._left, self.longest_pause, seconds - self._model.predict(Features()))
            self._least = 0

    def begin(self, decodes: Features, hurry: bool = False) -> None:
        """A step with these decodes."""
        hurry = hurry and not self._interruptible
        self._left, self._most, self._taken, self._least = None, MOST_CHUNK, 0, LEAST_CHUNK
        if self._slo <= 0:
            return
        if not self._model.warm:
            seconds = self._slo * HURRY if hurry else self._slo
            self._most = min(MOST_CHUNK, max(LEAST_CHUNK, self._model.cautious(seconds)))
            return
        base = self._model.predict(decodes)
        limit = self._slo if decodes.decodes else max(self._slo, 4 * base)
        if hurry:
            empty = self._model.predict(Features())
            limit = min(limit, max(self._slo * HURRY, 2 * base, EMPTY_STEPS * empty))
        self._left = limit - base

    @property
    def is_full(self) -> bool:
        """Not one more token of any prompt would be taken."""
        if self._taken >= self._most:
            return True
        if self._left is None or self._taken < self._least:
            return False
        least = self._model.prompt_token(0.0)
        return least > 0 and self._left < least

    def take(self, wanted: int, context: int) -> int:
        """Of `wanted` tokens of a prompt with `context` before them, how many may be computed."""
        fits, token = MOST_CHUNK, 0.0
        if self._left is not None:
            token = self._model.prompt_token(context + min(wanted, MOST_CHUNK) / 2)
            fits = max(0, int(self._left / token)) if token > 0 else MOST_CHUNK
        fits = max(fits, self._least - self._taken)
        n = max(0, min(wanted, fits, self._most - self._taken))
        if self._left is not None:
            self._left -= n * token
        self._taken += n
        return n
