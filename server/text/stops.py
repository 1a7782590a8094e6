"""Stop strings over a stream of text."""

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """Looks for stop strings in text that arrives in pieces.

    The stop that ends first wins; of several that end there, the one that begins first. So the outcome does
    not depend on how the text was cut. `feed` gives out all text but the longest end that may be the
    beginning of a stop. Linear in the text: one step of an Aho-Corasick automaton (Aho and Corasick, 1975)
    for each character.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string. Takes time in proportion to the length of all."""
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._ends = [0]
        """For each state the length of the longest stop that ends in it; 0 for none."""
        for stop in stops:
            self._add(stop)
        self._fallback = self._link()
        self._first = frozenset(self._next[0])
        self._state = 0
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def feed(self, text: str) -> str:
        """Text that is now known to come before any stop. Nothing more comes after a match."""
        if self.matched is not None:
            return ""
        text = self._held + text
        state = self._state
        for i in range(len(self._held), len(text)):
            c = text[i]
            if not state:
                if c in self._first:
                    state = self._next[0][c]
            else:
                state = self._step(state, c)
            if length := self._ends[state]:
                start = i + 1 - length
                self.matched = text[start : i + 1]
                self._held = ""
                return text[:start]
        self._state = state
        # The automaton's depth is the length of the longest end of the text that begins a stop.
        given = len(text) - self._depth[state]
        self._held = text[given:]
        return text[:given]

    def finish(self) -> str:
        """What was held back, when the stream ends without a match."""
        held, self._held, self._state = self._held, "", 0
        return held

    def _add(self, stop: str) -> None:
        state = 0
        for c in stop:
            if c not in self._next[state]:
                self._next[state][c] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._ends.append(0)
            state = self._next[state][c]
        self._ends[state] = len(stop)

    def _link(self) -> list[int]:
        """For each state the state of its longest proper end that begins a stop."""
        fallback = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            # A longer stop that ends here was noted first and stays; else one may end within.
            self._ends[state] = self._ends[state] or self._ends[fallback[state]]
            for c, child in self._next[state].items():
                queue.append(child)
                back = fallback[state]
                while back and c not in self._next[back]:
                    back = fallback[back]
                fallback[child] = self._next[back].get(c, 0)
        return fallback

    def _step(self, state: int, c: str) -> int:
        while state and c not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(c, 0)
