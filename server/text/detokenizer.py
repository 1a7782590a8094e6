"""Token ids to text while they are generated."""

import codecs
from collections.abc import Iterable
from typing import Protocol


class Pieces(Protocol):
    """What detokenizing needs of a vocabulary."""

    add_space_prefix: bool

    def token_bytes(self, token: int) -> bytes: ...

    def is_control(self, token: int) -> bool: ...


class Detokenizer:
    """The text of one growing sequence of ids. Each call costs O(new tokens); the deltas joined are the whole
    text.

    A character whose bytes are spread over tokens appears with its last byte; bytes that are not UTF-8 become
    U+FFFD. Control tokens have no text unless `special`. SentencePiece encodes a text's beginning with a
    space before it; `at_beginning` says that the first id begins a text (what follows a control token does),
    so that the space is removed: false when the ids continue a text, whose next word then keeps its space.
    """

    def __init__(self, vocabulary: Pieces, special: bool = False, at_beginning: bool = True) -> None:
        self._vocabulary = vocabulary
        self._special = special
        self._drop_space = at_beginning and vocabulary.add_space_prefix
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Iterable[int]) -> str:
        """Text that `tokens` complete. IndexError for an id outside the vocabulary."""
        vocabulary = self._vocabulary
        shown = [token for token in tokens if self._special or not vocabulary.is_control(token)]
        data = b"".join(map(vocabulary.token_bytes, shown))
        if not data:
            return ""
        if self._drop_space:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """The end of the text: U+FFFD when the last character is incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)
