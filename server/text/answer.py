"""The text of one answer while its tokens come: up to a stop string, and what the model thought apart."""

from collections import deque
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from ktransformers.server.text.detokenizer import Detokenizer, Pieces
from ktransformers.server.text.reasoning import Kind, Reasoning
from ktransformers.server.text.stops import StopStrings

Mark = TypeVar("Mark")


class Piece(NamedTuple, Generic[Mark]):
    """What some tokens add."""

    text: str
    reasoning: str
    finish: str
    """As it was given, or "stop" where a stop string was found."""
    marks: Sequence[Mark]
    """Of the tokens whose text has begun to be given out: a token that only a stop string has, has none."""


class AnswerText(Generic[Mark]):
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
        self._waiting: deque[tuple[int, Mark]] = deque()
        """Marks of tokens whose text a stop string may take, and where that text begins."""
        self._made = self._given = 0
        """Characters of the answer so far, with those that a stop string may take and without."""

    def feed(self, tokens: Sequence[int], finish: str, marks: Sequence[Mark] = ()) -> Piece[Mark]:
        """The next tokens; `finish` if they are the last. What they add does not depend on how many come at
        once. `marks`, one for each token or none, come out with its text."""
        reasoning = self.reasoning
        if reasoning is None or not self._apart:
            if reasoning is not None:
                for token in tokens:
                    reasoning.kind(token)
            if marks and self._stops is not None:
                text = "".join(self._marked(token, mark) for token, mark in zip(tokens, marks, strict=True))
                return self._piece(text, "", finish)
            text = self._text.feed(tokens)
            self._made += len(text)
            return self._piece(text, "", finish, marks)
        text, thought = "", ""
        for i, token in enumerate(tokens):
            kind = reasoning.kind(token)
            if kind is Kind.REASONING:
                thought += self._trimmed_thought(token)
            elif kind is Kind.ANSWER:
                text += self._marked(token, *marks[i : i + 1])
            self._trim_text = self._trim_text or kind is not Kind.ANSWER
        return self._piece(text, thought, finish)

    def _marked(self, token: int, *mark: Mark) -> str:
        self._waiting += ((self._made, each) for each in mark)
        text = self._trimmed_text(token)
        self._made += len(text)
        return text

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

    def _piece(self, text: str, thought: str, finish: str, marks: Sequence[Mark] = ()) -> Piece[Mark]:
        """`marks` wait for nothing."""
        if finish:
            text += self._text.finish()
            thought += self._thought.finish()
        matched = False
        if self._stops is not None:
            text = self._stops.feed(text)
            if matched := self._stops.matched is not None:
                finish = "stop"
            elif finish:
                text += self._stops.finish()
        self._given += len(text)
        if self._waiting:
            all_of_them = self._stops is None or (bool(finish) and not matched)
            marks = list(marks)
            while self._waiting and (all_of_them or self._waiting[0][0] < self._given):
                marks.append(self._waiting.popleft()[1])
        return Piece(text, thought, finish, marks)
