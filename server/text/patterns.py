"""Whether a regular expression takes time linear in the text, so that a model's file may bring it along.

The expressions of a tokenizer.json run on Oniguruma, which backtracks: one like `(a+)+$` takes time
exponential in the text, and text comes from anybody. Those that tokenizers really have are alternatives of
short sequences of sets (`[^\\r\\n\\p{L}\\p{N}]?\\p{L}+`), and of such it can be told:

- A branch is a sequence of sets, each with a quantifier, of groups of plain words, and of a look at the next
  character. At most two of its parts have no upper bound, and after a second one nothing can fail. So an
  attempt costs what its first run of characters is long, times a constant.
- A branch that may fail after such a run (`\\s+(?!\\S)`) is followed by one that takes the same run (`\\s+`),
  so that what was looked at in vain is not looked at again from each of its characters. Where it succeeds, it
  has taken all up to the last place where it could, and the same holds for the rest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

MAX_CHARS: Final = 8192
_MAX_REPEAT: Final = 16
"""Highest bound of a quantifier."""
_MAX_WAYS: Final = 256
"""Ways to match the bounded parts, all branches together: the constant."""
_MAX_PARTS: Final = 512


class PatternError(ValueError):
    """Why an expression is refused, to follow its text."""


@dataclass(frozen=True)
class Part:
    """A set, a group of words, or a look at the next character."""

    text: str
    words: int = 1
    """Alternatives of a group."""
    look: bool = False
    low: int = 1
    high: int | None = 1

    @property
    def can_fail(self) -> bool:
        return self.look or self.low > 0

    @property
    def ways(self) -> int:
        """Ways to match it at one place; of an unbounded part those are counted by length instead."""
        return 1 if self.high is None else self.words ** max(self.high, 1) * (self.high - self.low + 1)


def check_linear(pattern: str) -> None:
    """Raises PatternError for an expression that may take more than time linear in the text, or is not of the
    kind for which that can be told."""
    if len(pattern) > MAX_CHARS:
        raise PatternError(f"has more than {MAX_CHARS} characters")
    branches = _Reader(pattern).branches()
    ways = 0
    for i, branch in enumerate(branches):
        if (run := _run_before_a_failure(branch)) and not _takes(branches[i + 1 : i + 2], run):
            raise PatternError(f"may fail after a run of {run.text[:60]} which no branch after it takes")
        firm = max((k for k, part in enumerate(branch) if part.can_fail), default=0)
        product = 1
        for part in branch[:firm]:
            product = min(product * part.ways, _MAX_WAYS + 1)
        ways += product * len(branch)
    if ways > _MAX_WAYS or sum(map(len, branches)) > _MAX_PARTS:
        raise PatternError("has too many ways to match")


def _run_before_a_failure(branch: list[Part]) -> Part | None:
    """The first unbounded part, if something that may fail follows. Raises PatternError."""
    open_ = [k for k, part in enumerate(branch) if part.high is None]
    if not open_:
        return None
    if len(open_) > 2 or (len(open_) == 2 and any(part.can_fail for part in branch[open_[1] + 1 :])):
        raise PatternError("has parts without an upper bound one after another")
    return branch[open_[0]] if any(part.can_fail for part in branch[open_[0] + 1 :]) else None


def _takes(following: list[list[Part]], run: Part) -> bool:
    """Whether the next branch matches whatever begins with a character of `run`, as far as that goes."""
    if not following:
        return False
    for part in following[0]:
        if part.high is None:
            return part.text == run.text and part.low <= 1
        if part.can_fail:
            return False
    return False


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def branches(self) -> list[list[Part]]:
        found = list(self._alternatives())
        if self._at < len(self._text):
            raise PatternError("has a bracket too many")
        return found

    def _alternatives(self) -> Iterator[list[Part]]:
        while True:
            branch: list[Part] = []
            while self._at < len(self._text) and self._text[self._at] not in "|)":
                branch.append(self._quantified(self._atom()))
            if not branch:
                raise PatternError("has an empty branch")
            yield branch
            if self._at == len(self._text) or self._text[self._at] == ")":
                return
            self._at += 1

    def _atom(self) -> Part:
        first = self._text[self._at]
        if first == "(":
            return self._group()
        start = self._at
        if first == "[":
            self._set()
        elif first == "\\":
            self._escape()
        elif first in "^$?*+{":
            raise PatternError(f"has {first!r}, for which nothing is known")
        else:
            self._at += 1
        return Part(self._text[start : self._at])

    def _escape(self) -> None:
        r"""`\s`, `\p{Lu}`, `\|`; no references, anchors or codes."""
        letter = self._text[self._at + 1 : self._at + 2]
        if letter in ("p", "P") and self._text[self._at + 2 : self._at + 3] == "{":
            end = self._text.find("}", self._at)
            if end < 0:
                raise PatternError("has an open brace")
            self._at = end + 1
        elif letter and (letter in "sSdDwWnrtfv" or not letter.isalnum()):
            self._at += 2
        else:
            raise PatternError(f"has '\\{letter}', for which nothing is known")

    def _set(self) -> None:
        depth = 0
        while True:
            here = self._text[self._at : self._at + 1]
            if not here:
                raise PatternError("has an open bracket")
            if here == "\\":
                self._at += 1
            elif here == "[":
                depth += 1
                rest = self._text[self._at + 1 : self._at + 3]
                if rest[:1] == "]" or rest == "^]":
                    raise PatternError("has a bracket that may be a character or an end")
            elif here == "]":
                depth -= 1
            self._at += 1
            if not depth:
                return

    def _group(self) -> Part:
        start = self._at
        for opening in ("(?:", "(?i:", "(?!", "(?="):
            if self._text.startswith(opening, self._at):
                break
        else:
            raise PatternError("has a group, for which nothing is known")
        self._at += len(opening)
        words = list(self._alternatives())
        if self._text[self._at : self._at + 1] != ")":
            raise PatternError("has an open bracket")
        self._at += 1
        if any(part != Part(part.text) for word in words for part in word):
            raise PatternError("has a group of more than words")
        look = opening in ("(?!", "(?=")
        if look and [len(word) for word in words] != [1]:
            raise PatternError("looks ahead for more than a character")
        return Part(self._text[start : self._at], words=len(words), look=look)

    def _quantified(self, atom: Part) -> Part:
        low, high, length = self._quantifier()
        if not length:
            return atom
        self._at += length
        if atom.look or (high is None and atom.text[0] == "("):
            raise PatternError("repeats a group")
        if max(low, high or 0) > _MAX_REPEAT:
            raise PatternError(f"repeats something more than {_MAX_REPEAT} times")
        if self._text[self._at : self._at + 1] in ("?", "*", "+", "{"):
            raise PatternError("has a quantifier of a quantifier")
        return Part(atom.text, words=atom.words, low=low, high=high)

    def _quantifier(self) -> tuple[int, int | None, int]:
        """Bounds, and the length of what says so; possessive ones are as others."""
        simple = {"?": (0, 1), "*": (0, None), "+": (1, None)}
        first = self._text[self._at : self._at + 1]
        if first in simple:
            possessive = self._text[self._at + 1 : self._at + 2] == "+"
            return (*simple[first], 1 + possessive)
        if first != "{":
            return 1, 1, 0
        inner, brace, _ = self._text[self._at + 1 : self._at + 16].partition("}")
        low, comma, high = inner.partition(",")
        if not brace or not low.isdecimal() or (high and not high.isdecimal()):
            raise PatternError("has a brace, for which nothing is known")
        most = int(low) if not comma else int(high) if high else None
        if most is not None and most < int(low):
            raise PatternError("has a brace, for which nothing is known")
        return int(low), most, len(inner) + 2
