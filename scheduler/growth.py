"""How far the KV of what runs will grow: the watermark of admission.

Blocks are taken as tokens come, so more may be let in than would fit if all wrote their max_tokens. How
many more is a bet on their output lengths; a lost bet costs a preemption, whose tokens may have to be
computed again.
"""

from collections.abc import Iterable

from ktransformers.scheduler.request import Request

_WEIGHT = 1 / 16
"""Of the newest output length in the average."""
_RAISE = 1.5
_MOST = 8.0
_DECAY = 0.998
"""A step; after some 350 steps the factor is halved."""


class OutputEstimate:
    """How many tokens a request will still draw: min(max_tokens, average output) x factor.

    The average of no observation is the request's own max_tokens, and each observation takes a sixteenth of
    what is left of that prior: the requests that end first are the short ones, so a few of them say little.
    The factor is SGLang's new-token ratio turned round: each preemption raises it, each step lets it decay
    towards 1.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._sum = 0.0
        self._prior = 1.0

    def ended(self, output_tokens: int) -> None:
        """A request has ended by itself after so many output tokens."""
        self._sum += (output_tokens - self._sum) * _WEIGHT
        self._prior *= 1 - _WEIGHT

    def preempted(self) -> None:
        """The bet was lost."""
        self.factor = min(self.factor * _RAISE, _MOST)

    def stepped(self) -> None:
        """A step was planned."""
        self.factor = max(self.factor * _DECAY, 1.0)

    def left(self, request: Request) -> int:
        """Tokens that it will still draw: a quarter of its output so far at least, up to max_tokens."""
        most = request.sampling.max_tokens
        expected = min(most, self._sum + self._prior * most) * self.factor
        return min(most - request.drawn, round(max(expected - request.drawn, request.drawn / 4)))


def peak_blocks(shared: int, runs: Iterable[tuple[int, int]], block_tokens: int) -> int:
    """The most blocks that will be held at once if each sequence draws a token a step and leaves at its end.

    `runs`: (blocks that it holds alone, its prompt's yet to come among them; tokens that it will still
    draw). `shared`: blocks held by more than one, which are never counted as freed. (The idea is the
    "Past-Future" scheduler's.)
    """
    by_end = sorted(runs, key=lambda run: run[1])
    held = sum(own for own, _ in by_end)
    peak = held
    alive = len(by_end)
    grown = 0
    for own, left in by_end:
        # Just before this one leaves, everybody still there has grown by `left` tokens.
        grown = -(-left // block_tokens)
        peak = max(peak, held + alive * grown)
        held -= own
        alive -= 1
    return shared + peak
