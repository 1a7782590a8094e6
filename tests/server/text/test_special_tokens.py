"""Control tokens are found in a template's text, and never in what a client wrote."""

import itertools
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransformers.server.text.special_tokens import SpecialTokens, unused_mark

MARK = "\U000f0000"
NAMES = [
    "<s>",
    "</s>",
    "<<s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im|>",
    "<|a|>",
    "[INST]",
    "[/INST]",
    "ab",
    "aba",
    ">>",
]
SPECIAL = SpecialTokens({name: i for i, name in enumerate(NAMES)})
FRAGMENTS = st.lists(
    st.sampled_from(
        [
            "<",
            "|",
            ">",
            "<|",
            "|>",
            "im_",
            "im",
            "start",
            "end",
            "s",
            "/",
            "a",
            "b",
            "[",
            "INST",
            "]",
            " ",
            "x",
        ]
    ),
    max_size=12,
).map("".join)


def naive_split(text: str) -> list[str | int]:
    """Leftmost, then longest."""
    pieces: list[str | int] = []
    plain = ""
    i = 0
    while i < len(text):
        found = max((n for n in NAMES if text.startswith(n, i)), key=len, default="")
        if not found:
            plain += text[i]
            i += 1
            continue
        pieces += [plain] * bool(plain) + [NAMES.index(found)]
        plain = ""
        i += len(found)
    return pieces + [plain] * bool(plain)


def occurrences(text: str) -> int:
    return sum(text.startswith(name, i) for name in NAMES for i in range(len(text)))


@given(FRAGMENTS)
@settings(max_examples=400, deadline=None)
def test_split(text: str) -> None:
    assert list(SPECIAL.split(text)) == naive_split(text)


@given(FRAGMENTS)
@settings(max_examples=400, deadline=None)
def test_guarded_text_holds_none_and_is_the_same_text(text: str) -> None:
    guarded = SPECIAL.guard(text, MARK)
    assert occurrences(guarded) == 0
    assert guarded.replace(MARK, "") == text
    # What a template may do to text does not bring one back.
    for changed in (guarded.strip(), guarded.upper().lower(), guarded[1:], guarded[:-1], guarded[::-1][::-1]):
        assert occurrences(changed) == 0
    for piece in guarded.split("x") + guarded.split("<"):
        assert occurrences(piece) == 0


@given(st.lists(FRAGMENTS, min_size=1, max_size=4), st.sampled_from(["", " ", "\n"]))
@settings(max_examples=400, deadline=None)
def test_texts_next_to_each_other(texts: Sequence[str], space: str) -> None:
    """Several strings of clients, trimmed and joined with nothing between them."""
    guarded = [SPECIAL.guard(space + text + space, MARK) for text in texts]
    assert occurrences("".join(guarded)) == 0
    assert occurrences("".join(g.strip() for g in guarded)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_framed_by_a_template(name: str) -> None:
    """Every way to cut a control token into template, client's text, template."""
    for i, j in itertools.combinations(range(len(name) + 1), 2):
        guarded = SPECIAL.guard(name[i:j], MARK)
        if (i, j) != (0, 0):
            assert occurrences(name[:i] + guarded + name[j:]) < occurrences(name) or i == j
            assert NAMES.index(name) not in list(SPECIAL.split(name[:i] + guarded + name[j:]))


@pytest.mark.parametrize("text", ["", "Hello, world", "a < b", "if (x > 3) {", "I <3 you", "<div>text</div>"])
def test_ordinary_text_is_not_touched(text: str) -> None:
    special = SpecialTokens({"<|im_start|>": 1, "<|im_end|>": 2, "<|endoftext|>": 0})
    assert special.guard(text, MARK) == text


def test_mark_is_in_no_text() -> None:
    assert unused_mark(["abc", "漢字"]) == MARK
    taken = "".join(map(chr, range(0xF0000, 0xF0100)))
    assert unused_mark([taken, "x"]) == chr(0xF0100)
    everything = "".join(map(chr, [*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE)]))
    with pytest.raises(ValueError, match="private-use"):
        unused_mark([everything])


def test_bounds() -> None:
    with pytest.raises(ValueError, match="characters"):
        SpecialTokens({"x" * 200: 1})
    with pytest.raises(ValueError, match="characters"):
        SpecialTokens({f"<|reserved_special_token_{i}|>": i for i in range(20_000)})
    nested = SpecialTokens({"a" * n: n for n in range(2, 129)})  # as deep as a pattern can be
    assert list(nested.split("a" * 130)) == [128, 2]


@pytest.mark.parametrize("unit", ["<", "<|im_", "<|im_end|>", "a", " ", "ab"])
def test_time_is_linear(unit: str) -> None:
    special = SpecialTokens(
        {f"<|reserved_{i}|>": i for i in range(6000)} | {"<|im_end|>": 6000, "<|im_start|>": 6001}
    )
    list(special.split("warm")), special.guard("warm", MARK)
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    guarded = special.guard(text, MARK)
    list(special.split(guarded))
    assert time.process_time() - start < 3.0
