"""The text of one answer while its tokens come: up to a stop string, and what the model thought apart."""

from collections.abc import Sequence
from typing import NamedTuple

from ktransformers.server.text.detokenizer import Detokenizer, Pieces
from ktransformers.server.text.reasoning import Kind, Reasoning
from ktransformers.server.text.stops import StopStrings


class Piece(NamedTuple):
    """What some tokens add."""

    text: str
    reasoning: str
    finish: str
    """As it was given, or "stop" where a stop string was found."""
    kept: Sequence[int]
    """Which of the tokens are of `text`."""


class AnswerText:
    """Of one choice. Stop strings are looked for in the answer, not in the reasoning before it."""

    def __init__(
        self,
        vocabulary: Pieces,
        stop: Sequence[str] = (),
        reasoning: Reasoning | None = None,
        continues: bool = False,
    ) -> None:
        """`continues`: the output goes on with the prompt's text, so that a space before its first word is
        part of it, and so is what marks reasoning: that is counted, and left where it stands."""
        self.reasoning = reasoning
        self._text = Detokenizer(vocabulary, at_beginning=not continues)
        self._thought = Detokenizer(vocabulary)
        self._stops = StopStrings(stop) if stop else None
        self._apart = not continues
        self._trim_thought = True
        self._trim_text = False
        """Until there is more than white space: models begin both with empty lines."""

    def feed(self, tokens: Sequence[int], finish: str) -> Piece:
        """The next tokens; `finish` if they are the last. What they add does not depend on how many come at
        once."""
        reasoning = self.reasoning
        if reasoning is None:
            return self._piece(self._text.feed(tokens), "", finish, range(len(tokens)))
        if not self._apart:
            for token in tokens:
                reasoning.kind(token)
            return self._piece(self._text.feed(tokens), "", finish, range(len(tokens)))
        kept, text, thought = [], "", ""
        for i, token in enumerate(tokens):
            kind = reasoning.kind(token)
            if kind is Kind.REASONING:
                thought += self._trimmed_thought(token)
            elif kind is Kind.ANSWER:
                kept.append(i)
                text += self._trimmed_text(token)
            self._trim_text = self._trim_text or kind is not Kind.ANSWER
        return self._piece(text, thought, finish, kept)

    def _trimmed_thought(self, token: int) -> str:
        text = self._thought.feed((token,))
        if self._trim_thought:
            text = text.lstrip()
            self._trim_thought = not text
        return text

    def _trimmed_text(self, token: int) -> str:
        text = self._text.feed((token,))
        if self._trim_text:
            text = text.lstrip()
            self._trim_text = not text
        return text

    def _piece(self, text: str, thought: str, finish: str, kept: Sequence[int]) -> Piece:
        if finish:
            text += self._text.finish()
            thought += self._thought.finish()
        if self._stops is not None:
            text = self._stops.feed(text)
            if self._stops.matched is not None:
                finish = "stop"
            elif finish:
                text += self._stops.finish()
        return Piece(text, thought, finish, kept)
