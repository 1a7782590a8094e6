"""Stop strings in a stream, against a search in the whole text."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransformers.server.text.stops import StopStrings

SMALL = st.text(alphabet="ab\u00e9", min_size=1, max_size=5)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The stop that ends first, of those the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@given(
    st.text(alphabet="ab\u00e9", max_size=40),
    st.lists(SMALL, max_size=5),
    st.lists(st.integers(0, 4), max_size=20),
)
@settings(max_examples=600, deadline=None)
def test_like_a_search_under_any_cutting(text: str, stops: list[str], sizes: list[int]) -> None:
    stream = StopStrings(stops)
    given_out = ""
    seen = ""
    for piece in cut(text, sizes):
        given_out += stream.feed(piece)
        seen += piece
        if stream.matched is None:
            held = seen[len(given_out) :]
            assert seen == given_out + held
            # What is held back is the longest end that begins a stop, no more and no less.
            ends = [
                n
                for n in range(len(seen) + 1)
                if any(s.startswith(seen[len(seen) - n :]) for s in stops if n < len(s))
            ]
            assert len(held) == max(ends, default=0)
    if stream.matched is None:
        given_out += stream.finish()
    assert (given_out, stream.matched) == naive(text, stops)


def test_a_stop_over_several_pieces() -> None:
    stream = StopStrings(["\n\nUser:", "</s>"])
    assert [stream.feed(p) for p in ("Hi", " <", "b>\n", "\nUs", "er", ": x")] == [
        "Hi",
        " ",
        "<b>",
        "",
        "",
        "",
    ]
    assert stream.matched == "\n\nUser:"
    assert stream.feed("more") == ""
    assert stream.finish() == ""


def test_no_stops() -> None:
    stream = StopStrings([])
    assert stream.feed("text") == "text"
    assert stream.finish() == ""


def test_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopStrings(["a", ""])


@pytest.mark.parametrize("unit", ["a", "ab", "x"])
def test_time_is_linear(unit: str) -> None:
    """Sixteen stops of 128 characters, all of which nearly match everywhere."""
    stops = ["a" * (112 + i) + "b" for i in range(16)]
    text = unit * 100_000
    start = time.process_time()
    stream = StopStrings(stops)
    for i in range(0, len(text), 3):
        stream.feed(text[i : i + 3])
    assert time.process_time() - start < 3.0
