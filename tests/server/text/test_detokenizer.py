"""Deltas of a stream: joined they are the text, nothing is given out that a later token could change."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransformers.server.text.detokenizer import Detokenizer
from ktransformers.server.text.model import TextModel
from ktransformers.server.text.tokenizer import Tokenizer

Make = Callable[[str], tuple[Any, dict[str, object]]]
_made: dict[int, Tokenizer] = {}


def _tokenizer(metadata: dict[str, object]) -> Tokenizer:
    if id(metadata) not in _made:
        _made[id(metadata)] = Tokenizer.from_metadata(metadata)
    return _made[id(metadata)]


def _stream(tokenizer: Tokenizer, ids: list[int], cuts: list[int], special: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, special=special)
    deltas = []
    start = 0
    for cut in cuts:
        deltas.append(detokenizer.feed(ids[start : start + cut]))
        start += cut
    deltas.append(detokenizer.feed(ids[start:]))
    deltas.append(detokenizer.finish())
    return deltas


@given(data=st.data(), special=st.booleans())
@settings(max_examples=300, deadline=None)
def test_deltas_are_the_text(byte_level: Make, spm: Any, data: st.DataObject, special: bool) -> None:
    """Any ids at all, cut anywhere: invalid UTF-8 is a matter of course."""
    for metadata in (byte_level("qwen2")[1], spm[1]):
        tokenizer = _tokenizer(metadata)
        ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
        cuts = data.draw(st.lists(st.integers(0, 3), max_size=20))
        deltas = _stream(tokenizer, ids, cuts, special)
        assert "".join(deltas) == tokenizer.decode(ids, special=special)
        raw = b"".join(tokenizer.token_bytes(i) for i in ids if special or not tokenizer.is_control(i))
        if tokenizer.add_space_prefix:
            raw = raw.removeprefix(b" ")
        assert "".join(deltas) == raw.decode("utf-8", "replace")


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_no_delta_ends_inside_a_character(byte_level: Make, text: str) -> None:
    tokenizer = _tokenizer(byte_level("qwen2")[1])
    ids = tokenizer.encode(text)
    deltas = _stream(tokenizer, ids, [1] * len(ids), False)
    assert "".join(deltas) == text
    assert text or not any(deltas)
    assert "\ufffd" in text or "\ufffd" not in "".join(deltas)


def test_an_emoji_appears_with_its_last_byte(spm: Any) -> None:
    tokenizer = _tokenizer(spm[1])
    ids = [i for i in tokenizer.encode("🛸") if len(tokenizer.token_bytes(i)) == 1][-4:]
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == "🛸".encode()
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.feed([i]) for i in ids] == ["", "", "", "🛸"]
    assert detokenizer.feed(ids[:2]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_leading_space(spm: Any) -> None:
    tokenizer = _tokenizer(spm[1])
    ids = tokenizer.encode("Hello world")
    if tokenizer.add_space_prefix:
        assert Detokenizer(tokenizer).feed(ids) == "Hello world"
        assert Detokenizer(tokenizer, at_beginning=False).feed(ids) == " Hello world"
        assert Detokenizer(tokenizer).feed([1, *ids]) == "Hello world"
        assert Detokenizer(tokenizer).feed(tokenizer.encode("  two")) == "  two"
    else:
        assert Detokenizer(tokenizer).feed(tokenizer.encode(" two")) == " two"


def test_control_tokens_are_silent(default_model: TextModel) -> None:
    tokenizer = default_model.tokenizer
    ids = [1, *tokenizer.encode("hi"), 2]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, special=True) == "<|im_start|>hi<|im_end|>"


def test_ids_outside_the_vocabulary(default_model: TextModel) -> None:
    with pytest.raises(IndexError):
        Detokenizer(default_model.tokenizer).feed([10**6])


def test_cost_does_not_grow_with_the_text(default_model: TextModel) -> None:
    detokenizer = Detokenizer(default_model.tokenizer)
    token = default_model.tokenizer.encode(" word")
    start = time.process_time()
    for _ in range(100_000):
        detokenizer.feed(token)
    assert time.process_time() - start < 3.0
