"""Expressions that a model's file brings along: what is accepted takes steps linear in the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransformers.server.text.patterns import Part, PatternError, _Reader, check_linear
from ktransformers.server.text.pretokenizers import PRE_TOKENIZERS

# As in tokenizers of models that are on no list of ours.
PHI4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
KNOWN = {pattern for pre in PRE_TOKENIZERS.values() for pattern in pre.patterns} - {r"(?<!\s)\s+$"}
"""But for one that looks behind: it is accepted because we know it."""


@pytest.mark.parametrize("pattern", [*sorted(KNOWN), PHI4, " {2,}", r"[a-z&&[^b]]+", r"\d{3}|\w+"])
def test_what_models_have_is_accepted(pattern: str) -> None:
    check_linear(pattern)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        (r"(a+)+$", "group"),
        (r"(?:a+)+b", "more than words"),
        (r"(?:a|a)*b", "repeats a group"),
        (r"(?:a|b){2,}", "repeats a group"),
        (r"a*a*a*b", "without an upper bound"),
        (r"a+a+b|a+", "without an upper bound"),
        (r"\s+$", r"\$"),
        (r"^a", r"\^"),
        (r"\s+(?!\S)", "which no branch after it takes"),
        (r"a+b|c|a+", "which no branch after it takes"),
        (r"a+b|[a]+", "which no branch after it takes"),
        (r"a+b|a{2,}", "which no branch after it takes"),
        (r"a+b|xa+", "which no branch after it takes"),
        (r"(?=(\d{3})+(?!\d))", "group"),
        (r"\d(?=\d\d)", "looks ahead"),
        (r"(?<!\s)a", "group"),
        (r"(a)\1", "group"),
        (r"\1", "nothing is known"),
        (r"\b", "nothing is known"),
        (r"a?" * 9 + "b", "too many ways"),
        (r"(?:a|b|c|d)" * 5 + "e", "too many ways"),
        (r"a{1,1000}", "more than 16 times"),
        (r"a{17,}", "more than 16 times"),
        (r"a{2,3}+", "quantifier of a quantifier"),
        (r"a+?", "quantifier of a quantifier"),
        (r"(?!a)+", "repeats a group"),
        (r"a|", "empty branch"),
        (r"", "empty branch"),
        (r"a)", "bracket too many"),
        (r"(?:a", "open bracket"),
        (r"[a", "open bracket"),
        (r"[]a]+", "may be a character"),
        ("\\", "nothing is known"),
        (r"\p{L", "open brace"),
        (r"a{x}", "brace"),
        ("a{9", "brace"),
        ("a" * 9000, "8192"),
    ],
)
def test_hostile_ones_are_refused(pattern: str, says: str) -> None:
    with pytest.raises(PatternError, match=says):
        check_linear(pattern)


class Counting:
    """A backtracking matcher over the letters a and b, as Oniguruma's: it counts what it tries."""

    def __init__(self, pattern: str, text: str) -> None:
        self._branches = _Reader(pattern).branches()
        self._text = text
        self.steps = 0

    def run(self) -> int:
        """Steps to find all matches."""
        at = 0
        while at < len(self._text):
            ends = (end for branch in self._branches for end in self._ends(branch, at))
            at = max(next(ends, at), at + 1)
        return self.steps

    def _ends(self, parts: list[Part], at: int):
        if not parts:
            yield at
            return
        part = parts[0]
        if part.look:
            self.steps += 1
            inside = at < len(self._text) and self._text[at] in part.text[3:]
            if inside == (part.text[2] == "="):
                yield from self._ends(parts[1:], at)
            return
        lengths = [0]
        while part.high is None or len(lengths) <= part.high:
            self.steps += 1
            place = at + len(lengths) - 1
            if place >= len(self._text) or self._text[place] not in part.text:
                break
            lengths.append(len(lengths))
        for length in reversed(lengths[part.low :]):
            self.steps += 1
            yield from self._ends(parts[1:], at + length)


PARTS = st.builds(
    "".join,
    st.tuples(st.sampled_from(["a", "b", "[ab]"]), st.sampled_from(["", "", "?", "*", "+", "{1,3}", "{2,}"])),
)
PATTERNS = st.lists(
    st.builds(
        lambda parts, look: "".join(parts) + look,
        st.lists(PARTS, min_size=1, max_size=4),
        st.sampled_from(["", "", "(?!a)", "(?=b)", "(?![ab])"]),
    ),
    min_size=1,
    max_size=4,
).map("|".join)
TEXTS = st.lists(
    st.tuples(st.text("abc", min_size=1, max_size=3), st.integers(1, 60)), min_size=1, max_size=4
).map(lambda runs: "".join(text * times for text, times in runs))


@given(PATTERNS, TEXTS)
@settings(max_examples=300, deadline=None)
def test_what_is_accepted_takes_linear_steps(pattern: str, text: str) -> None:
    try:
        check_linear(pattern)
    except PatternError:
        return
    # A quadratic one takes more on a run of 400: the square is 160,000.
    assert Counting(pattern, text + "a" * 200 + "b" * 200 + "ab" * 100).run() <= 100 * (len(text) + 600)


@pytest.mark.parametrize("pattern", ["a+(?!a)b", "a+b|b|a", "a+b", "a*a*b"])
def test_the_count_sees_what_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError):
        check_linear(pattern)
    assert Counting(pattern, "a" * 250).run() > 100 * 250
