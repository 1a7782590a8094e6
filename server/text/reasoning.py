"""What a model thinks before it answers, told from the answer by tokens of its own vocabulary.

A model that thinks has two tokens for it ("<think>" and "</think>" in most), and writes the first one at the
beginning of its output, unless its chat template has written it at the end of the prompt. Only there: one
that comes later is spoken of, and what a user writes is never at the end of a conversation's prompt. The
tokens between the two are its reasoning; the two are neither that nor answer. They are known by their texts
(PAIRS), as single tokens of the vocabulary that are no ordinary text: a model that spells them is not known
to think. gpt-oss has channels in their place (Channels).
"""

from collections.abc import Sequence
from enum import Enum
from typing import Final, Protocol

from ktransformers.server.text.detokenizer import Pieces

PAIRS: Final = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<seed:think>", "</seed:think>"),
)
CHANNEL_TOKENS: Final = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
_ANALYSIS: Final = b"analysis"
_MAX_HEADER: Final = 64
"""Bytes of a message's header that are looked at."""
_MAX_SPACE: Final = 8
"""Tokens of white space that a template may write behind a marker."""


class Kind(Enum):
    """What a token of an output belongs to."""

    ANSWER = "answer"
    REASONING = "reasoning"
    MARK = "mark"
    """To what keeps the two apart."""


class Reasoning(Protocol):
    """Of one output, whose tokens come one after the other."""

    tokens: int
    """Of reasoning, so far."""

    def kind(self, token: int) -> Kind:
        """What the next token belongs to."""
        ...


class Vocabulary(Pieces, Protocol):
    """What finding the markers needs of a vocabulary."""

    def marker_id(self, text: str) -> int | None:
        """The id of the token that is written so and is no ordinary text; None if there is none."""
        ...


class Between:
    """Reasoning between two tokens, at the beginning of an output."""

    def __init__(self, vocabulary: Pieces, prompt: Sequence[int], begin: int, end: int) -> None:
        self.tokens = 0
        self._vocabulary, self._begin, self._end = vocabulary, begin, end
        end_of_prompt = reversed(prompt[-_MAX_SPACE:])
        last = next((token for token in end_of_prompt if not self._is_space(token)), None)
        self._inside = last == begin
        self._ended = last == end  # "<think></think>" in a prompt asks for none

    def kind(self, token: int) -> Kind:
        """What the next token belongs to."""
        if self._ended:
            return Kind.ANSWER
        if self._inside:
            if token == self._end:
                self._ended = True
                return Kind.MARK
            self.tokens += 1
            return Kind.REASONING
        if token == self._begin:
            self._inside = True
            return Kind.MARK
        self._ended = not self._is_space(token)
        return Kind.ANSWER

    def _is_space(self, token: int) -> bool:
        return self._vocabulary.token_bytes(token).isspace()


class Channels:
    """gpt-oss ("harmony"): an output is messages, `<|channel|>NAME<|message|>…<|end|>`, of which those of the
    channel "analysis" are reasoning."""

    def __init__(self, vocabulary: Pieces, start: int, channel: int, message: int, end: int) -> None:
        self.tokens = 0
        self._vocabulary = vocabulary
        self._channel, self._message, self._edges = channel, message, (start, channel, end)
        self._header: bytes | None = None
        """What a message's header has said since its last mark; None within a message."""
        self._thinks = False

    def kind(self, token: int) -> Kind:
        """What the next token belongs to."""
        if token in self._edges:
            self._header = b""
            return Kind.MARK
        if token == self._message:
            self._thinks = (self._header or b"").lstrip().startswith(_ANALYSIS)
            self._header = None
            return Kind.MARK
        if self._header is not None:
            if len(self._header) < _MAX_HEADER:
                self._header += self._vocabulary.token_bytes(token)
            return Kind.MARK
        if self._thinks:
            self.tokens += 1
            return Kind.REASONING
        return Kind.ANSWER


class Markers:
    """Of one model."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._pair = next((ids for pair in PAIRS if (ids := _ids(vocabulary, pair))), None)
        self._channels = _ids(vocabulary, CHANNEL_TOKENS)

    @property
    def thinks(self) -> bool:
        """Whether the model has markers."""
        return self._channels is not None or self._pair is not None

    def reasoning(self, prompt: Sequence[int]) -> Reasoning | None:
        """Of an output that continues this prompt; None for a model that has no markers."""
        if self._channels is not None:
            return Channels(self._vocabulary, *self._channels)
        if self._pair is not None:
            return Between(self._vocabulary, prompt, *self._pair)
        return None


def _ids(vocabulary: Vocabulary, texts: Sequence[str]) -> tuple[int, ...] | None:
    ids = tuple(i for text in texts if (i := vocabulary.marker_id(text)) is not None)
    return ids if len(ids) == len(texts) else None
