"""Finding the control tokens of a vocabulary in text, and making sure that text from users never forms one.

A control token ("<|im_end|>") is one id that no text may produce: a client who could write it would speak in
the name of the system or of the model. Plain encoding never produces one (tokenizer.py keeps them out of the
merges). A rendered chat template is the one text in which they are looked for, and there users' text and the
template's own are already one string. So users' text is guarded before it enters the template: one character
that occurs nowhere else, the mark, is put inside every occurrence of a control token; it cannot match any
more, and when the rendered text has been split at the control tokens that are left, the template's, the marks
are removed and what remains is the user's text unchanged. The mark goes inside a token rather than around it
so that trimming, slicing and splitting in the template do not undo it, and ordinary text is left alone so
that a template's own tests on it see what was written.

Text of which only a part could belong to a control token is guarded too: an end that a following piece could
complete ("<|im_" + "end|>"), a beginning that completes what came before, and a whole that a template could
frame ("<" + name + ">").
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

MAX_CHARS: Final = 2**18
"""Characters of all control tokens: bounds the tables below. Real vocabularies have up to 80 k."""
MAX_LENGTH: Final = 128
_MARKS: Final = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Private-use planes: characters that mean nothing."""
# Unicode's White_Space, which str.isspace is not: that has the separators U+001C to U+001F, too.
_WHITE: Final = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True)
class Matching:
    """How a token is looked for: the fields of tokenizer.json's `added_tokens` (huggingface/tokenizers,
    added_vocabulary.rs)."""

    lstrip: bool = False
    """It takes the white space before it."""
    rstrip: bool = False
    """It takes the white space after it."""
    single_word: bool = False
    """It is none where a letter, digit or underscore is next to it."""
    late: bool = False
    """It is looked for in what the others left."""


_PLAIN: Final = Matching()
_CIRCLED_LETTERS: Final = (
    ("\u24b6", "\u24e9"),
    ("\U0001f130", "\U0001f149"),
    ("\U0001f150", "\U0001f169"),
    ("\U0001f170", "\U0001f189"),
)
"""Symbols that are alphabetic."""


class SpecialTokens:
    """Control tokens by text. Texts have 2 to MAX_LENGTH characters."""

    def __init__(self, ids: Mapping[str, int], matching: Mapping[str, Matching] | None = None) -> None:
        """`matching`: of those tokens that are not just looked for."""
        if sum(map(len, ids)) > MAX_CHARS or any(not 2 <= len(text) <= MAX_LENGTH for text in ids):
            raise ValueError(
                f"control tokens must have 2 to {MAX_LENGTH} characters, and {MAX_CHARS} characters in all"
            )
        self._ids = dict(ids)
        self._matching = dict(matching or {})
        self._pattern = _longest_of(sorted(ids))
        self._late = {text for text in ids if self._matching.get(text, _PLAIN).late}

    def id_of(self, text: str) -> int | None:
        """The id of the control token that is written `text`."""
        return self._ids.get(text)

    def split(self, text: str, mark: str = "") -> Iterator[str | int]:
        """Plain text and ids in order: `text` cut at control tokens, leftmost, then longest. Linear.

        A `mark` that `guard` has put beside a token is looked through.
        """
        pieces: Iterable[str | int] = (text,)
        for pattern in self._passes:
            pieces = self._cut(pieces, pattern, mark)
        yield from pieces

    def _cut(self, pieces: Iterable[str | int], pattern: re.Pattern[str], mark: str) -> Iterator[str | int]:
        for piece in pieces:
            if isinstance(piece, int):
                yield piece
            else:
                yield from self._cut_text(piece, pattern, mark)

    def _cut_text(self, text: str, pattern: re.Pattern[str], mark: str) -> Iterator[str | int]:
        end = 0
        white = _WHITE + mark
        for match in pattern.finditer(text):
            start, stop = match.span()
            how = self._matching.get(match[0], _PLAIN)
            if how.single_word and (_is_word_before(text, start, mark) or _is_word_after(text, stop, mark)):
                continue
            if how.lstrip:
                # What the token before has taken already is not looked at again.
                start = end + len(text[end:start].rstrip(white))
            if how.rstrip:
                stop = max(stop, end)
                while stop < len(text) and text[stop] in white:
                    stop += 1
            if start > end:
                yield text[end:start]
            yield self._ids[match[0]]
            end = stop
        if end < len(text):
            yield text[end:]

    def guard(self, text: str, mark: str) -> str:
        """Put `mark` inside everything in `text` that is, or could become a part of, a control token.

        Time is linear in the text.
        """
        if not self._ids or not text:
            return text
        places = set(self._places_at_edges(text))
        match = self._any.search(text)
        while match:  # occurrences may overlap
            place = match.start() + 1
            places.add(place)
            match = self._any.search(text, place)
        word = text.strip()
        if word and word in self._joined:
            places.add(text.index(word) + 1)
        if not places:
            return text
        pieces: list[str] = []
        last = 0
        for place in sorted(places):
            pieces += (text[last:place], mark)
            last = place
        pieces.append(text[last:])
        return "".join(pieces)

    def _places_at_edges(self, text: str) -> Iterator[int]:
        # Templates trim: what is at the edge is decided without the white space around it.
        end = len(text.rstrip())
        start = len(text) - len(text.lstrip())
        for n in range(1, min(self._longest, end - start) + 1):
            if text[end - n : end] in self._prefixes:
                yield end - n + 1
            if text[start : start + n] in self._suffixes:
                yield start + n - 1

    @cached_property
    def _any(self) -> re.Pattern[str]:
        return re.compile(self._pattern)

    @cached_property
    def _passes(self) -> list[re.Pattern[str]]:
        groups = (self._ids.keys() - self._late, self._late)
        return [re.compile(_longest_of(sorted(texts))) for texts in groups if texts]

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids))

    @cached_property
    def _prefixes(self) -> frozenset[str]:
        return frozenset(text[:n] for text in self._ids for n in range(1, len(text)))

    @cached_property
    def _suffixes(self) -> frozenset[str]:
        return frozenset(text[n:] for text in self._ids for n in range(1, len(text)))

    @cached_property
    def _joined(self) -> str:
        return "\0".join(self._ids)


def unused_mark(texts: Sequence[str]) -> str:
    """A private-use character that is in none of `texts`. ValueError when they use all of them."""
    first = chr(_MARKS[0][0])
    if not any(first in text for text in texts):
        return first
    used = set().union(*texts)
    for marks in _MARKS:
        for code in marks:
            if chr(code) not in used:
                return chr(code)
    raise ValueError("the text uses every private-use character of Unicode")


def _is_word_before(text: str, place: int, mark: str) -> bool:
    while place and text[place - 1] == mark:
        place -= 1
    return place > 0 and _is_word(text[place - 1])


def _is_word_after(text: str, place: int, mark: str) -> bool:
    while place < len(text) and text[place] == mark:
        place += 1
    return place < len(text) and _is_word(text[place])


def _is_word(character: str) -> bool:
    r"""As \w of Unicode (UTS 18, annex C): other than Python's it has marks and joiners, and no fractions."""
    category = unicodedata.category(character)
    return (
        category[0] in "LM" or category in ("Nd", "Nl", "Pc") or character in "\u200c\u200d"
        or any(first <= character <= last for first, last in _CIRCLED_LETTERS)
    )


def _longest_of(texts: list[str]) -> str:
    """A regular expression that matches the longest of the sorted `texts` that stands at a place.

    Common beginnings are factored out, so that matching costs the length of the match.
    """
    branches = []
    optional = False
    i = 0
    while i < len(texts):
        if not texts[i]:
            optional = True
            i += 1
            continue
        j = i
        while j < len(texts) and texts[j][0] == texts[i][0]:
            j += 1
        shared = _common_beginning(texts[i], texts[j - 1])
        branches.append(re.escape(shared) + _longest_of([text[len(shared) :] for text in texts[i:j]]))
        i = j
    if not branches:
        return ""
    body = branches[0] if len(branches) == 1 and not optional else f"(?:{'|'.join(branches)})"
    return body + "?" * optional


def _common_beginning(a: str, b: str) -> str:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return a[:n]
