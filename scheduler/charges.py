"""What a request costs, by what was done for it.

    cost = prompt * (prompt tokens computed) + cached * (prompt tokens found) + output * (tokens drawn)

and `floor` at least. Each token is charged once, when its step is done: what is computed again because this
server preempted the request, or because the engine died, is not charged.
"""

from dataclasses import dataclass

from ktransformers.scheduler.request import Request

UNIT = 1_000_000
"""Micro-units in a unit, which is the cost of a prompt token at its default price."""


@dataclass(frozen=True)
class Prices:
    """In micro-units."""

    prompt: int = UNIT
    cached: int = UNIT // 20
    output: int = 2 * UNIT
    floor: int = UNIT

    def executed(self, request: Request, start: int, until: int, drew: bool) -> int:
        """What is due for a step that took a request from `start` to `until` computed tokens."""
        if request.charged_until < request.n_prompt:
            self._charge_prompt(request, start, until)
        if drew:
            request.cost += self.output
        charged = request.cost if request.cost > self.floor else self.floor
        due = charged - request.charged
        request.charged = charged
        return due

    def _charge_prompt(self, request: Request, start: int, until: int) -> None:
        found, computed = min(start, request.n_prompt), min(until, request.n_prompt)
        # Steps are done in order, so what lies between the charged and the computed was found.
        request.cost += self.cached * max(0, found - request.charged_until)
        request.charged_until = max(request.charged_until, found)
        request.cost += self.prompt * max(0, computed - request.charged_until)
        request.charged_until = max(request.charged_until, computed)

    def expected(self, request: Request, found: int, outputs: int) -> int:
        """What is yet to be charged if `found` tokens are found and `outputs` more are drawn."""
        prompt, paid = request.n_prompt, request.charged_until
        found = min(found, prompt)
        hits = max(0, found - paid)
        return self.cached * hits + self.prompt * max(0, prompt - max(found, paid)) + self.output * outputs
