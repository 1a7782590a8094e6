"""Token ids like llama.cpp's (recorded), sentencepiece's and tokenizers'; special tokens; hostile files."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransformers.server.text.model import TextModel
from ktransformers.server.text.pretokenizers import PRE_TOKENIZERS
from ktransformers.server.text.tokenizer import Tokenizer, TooLongError
from ktransformers.server.text.vocabulary import VocabularyError

# What llama.cpp's tokenizer gives for the default model, recorded with llama-cpp-python 0.3.36.
LLAMA_CPP = json.loads((Path(__file__).parent / "smollm2_llamacpp.json").read_text())
Make = Callable[[str], tuple[Any, dict[str, object]]]


@pytest.mark.parametrize("case", LLAMA_CPP, ids=range(len(LLAMA_CPP)))
def test_default_model_like_llama_cpp(default_model: TextModel, case: dict[str, Any]) -> None:
    tokenizer = default_model.tokenizer
    assert tokenizer.encode(case["text"]) == case["plain"]
    assert tokenizer.encode(case["text"], special=True) == case["special"]


def test_default_model(default_model: TextModel) -> None:
    tokenizer = default_model.tokenizer
    assert tokenizer.vocab_size == 49152
    assert tokenizer.eog_ids == {0, 2, 4}  # <|endoftext|>, <|im_end|>, <reponame>: as llama.cpp says
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.add_eos) == (1, 2, False, False)
    assert tokenizer.token_bytes(2) == b"<|im_end|>"
    assert tokenizer.is_control(2) and not tokenizer.is_control(500)


DISTINCT = list({pre: name for name, pre in reversed(PRE_TOKENIZERS.items())}.values())
"""One name for each different pre-tokenizer."""


@pytest.mark.parametrize("pre", DISTINCT)
def test_byte_level_as_trained(byte_level: Make, torture: list[str], pre: str) -> None:
    trained, metadata = byte_level(pre)
    tokenizer = Tokenizer.from_metadata(metadata)
    for text in torture:
        ids = tokenizer.encode(text)
        if not PRE_TOKENIZERS[pre].ignore_merges:
            assert ids == trained.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(ids) == text


def test_sentencepiece_ids(spm: Any, torture: list[str]) -> None:
    sp, metadata = spm
    tokenizer = Tokenizer.from_metadata(metadata)
    for text in torture:
        text = text.replace("\x00", "")  # sentencepiece ends a text there
        assert tokenizer.encode(text) == sp.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_sentencepiece_any_text(spm: Any, text: str) -> None:
    sp, metadata = spm
    tokenizer = _cached(metadata)
    text = text.replace("\x00", "")
    assert tokenizer.encode(text) == sp.encode(text)


_made: dict[int, Tokenizer] = {}


def _cached(metadata: dict[str, object]) -> Tokenizer:
    if id(metadata) not in _made:
        _made[id(metadata)] = Tokenizer.from_metadata(metadata)
    return _made[id(metadata)]


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_byte_level_round_trip(byte_level: Make, text: str) -> None:
    tokenizer = _cached(byte_level("qwen2")[1])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_surrogates(default_model: TextModel) -> None:
    tokenizer = default_model.tokenizer
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udc00")) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"


def test_control_tokens_are_text_unless_asked_for(byte_level: Make, spm: Any) -> None:
    for metadata in (byte_level("llama-bpe")[1], byte_level("gpt-2")[1], spm[1]):
        tokenizer = Tokenizer.from_metadata(metadata)
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        assert isinstance(tokens, list) and isinstance(types, np.ndarray)
        control = [i for i, kind in enumerate(types) if kind in (2, 3)]
        for i in control:
            for text in (tokens[i], f"a{tokens[i]}b", f"{tokens[i]} {tokens[i]}"):
                assert not set(tokenizer.encode(text)) & set(control)
            assert tokenizer.encode(tokens[i], special=True) == [i]


def test_user_defined_tokens_are_found_in_text(byte_level: Make) -> None:
    tokenizer = Tokenizer.from_metadata(byte_level("qwen2")[1])
    ids = tokenizer.encode("x<think>y</think>")
    assert [tokenizer.token_bytes(i) for i in ids] == [b"x", b"<think>", b"y", b"</think>"]
    assert tokenizer.decode(ids) == "x<think>y</think>"


def test_prompt_has_bos(spm: Any) -> None:
    tokenizer = Tokenizer.from_metadata(spm[1])
    assert tokenizer.encode_prompt("hi") == [1, *tokenizer.encode("hi")]
    without = Tokenizer.from_metadata({**spm[1], "tokenizer.ggml.add_bos_token": False})
    assert without.encode_prompt("hi") == without.encode("hi")


def test_limit(default_model: TextModel) -> None:
    tokenizer = default_model.tokenizer
    assert tokenizer.encode("one two three", limit=3)
    with pytest.raises(TooLongError):
        tokenizer.encode("one two three four", limit=3)
    text = "one two three " * 20_000
    ids = tokenizer.encode(text)
    assert tokenizer.encode(text, limit=len(ids)) == ids
    with pytest.raises(TooLongError):
        tokenizer.encode(text, limit=len(ids) - 1)


@pytest.mark.parametrize("limit", [10, 8192, 131_072])
def test_work_on_text_that_is_too_long(default_model: TextModel, limit: int) -> None:
    """16 MiB, the largest body: as much work as the limit, not as the text."""
    text = "one two " * 2**21
    start = time.process_time()
    with pytest.raises(TooLongError):
        default_model.tokenizer.encode(text, limit=limit)
    assert time.process_time() - start < 1.5


UNITS = [" ", "a", "A", "1", "!", "\n", "字", "\u0301", "'s", " \n", "a ", "Aa", "\u02b0", "<|im_", "<"]


@pytest.mark.parametrize("pre", DISTINCT)
def test_time_is_linear(byte_level: Make, pre: str) -> None:
    _assert_linear(_cached(byte_level(pre)[1]))


def test_sentencepiece_time_is_linear(spm: Any) -> None:
    _assert_linear(_cached(spm[1]))


def _assert_linear(tokenizer: Tokenizer) -> None:
    """Quadratic time would be minutes for one of these; the bound is generous for busy machines."""
    for unit in UNITS:
        text = unit * (50_000 // len(unit)) + "x"
        start = time.process_time()
        tokenizer.encode(text)
        assert time.process_time() - start < 1.0, unit


def _vocabulary(n: int) -> dict[str, object]:
    """A SentencePiece vocabulary of n tokens: every piece is two shorter pieces in several ways."""
    pieces = [chr(c) for c in range(0x61, 0x7B)]
    pieces += [a + b for a in pieces[:26] for b in pieces[:26]]
    pieces += [a + b for a in pieces[26:702] for b in pieces[26:702]]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces][:n]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": -np.arange(n, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * (n - 259), np.int32),
    }


def test_large_vocabulary_is_built_quickly() -> None:
    metadata = _vocabulary(256_000)
    start = time.process_time()
    Tokenizer.from_metadata(metadata)
    assert time.process_time() - start < 4.0  # about 1 s alone; the machine may be slower


def test_unknown_pre_tokenizer_lists_the_known(byte_level: Make) -> None:
    with pytest.raises(
        VocabularyError, match=r"tokenizer.ggml.pre: 'nonesuch' is not known; known are .*qwen2"
    ):
        Tokenizer.from_metadata({**byte_level("gpt-2")[1], "tokenizer.ggml.pre": "nonesuch"})


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "", "x" * 10_000])
def test_other_models_are_refused(byte_level: Make, model: str) -> None:
    with pytest.raises(VocabularyError, match=r"tokenizer.ggml.model: .* is not supported"):
        Tokenizer.from_metadata({**byte_level("gpt-2")[1], "tokenizer.ggml.model": model})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", None),
        ("tokens", []),
        ("tokens", np.zeros(4)),
        ("tokens", ["a" * 2000]),
        ("tokens", ["a", "a"]),
        ("merges", []),
        ("merges", ["a"]),
        ("merges", ["nonesuch a"]),
        ("merges", "a b"),
        ("token_type", np.array([1, 1], np.int32)),
        ("token_type", ["1"]),
        ("bos_token_id", -1),
        ("bos_token_id", 10**6),
        ("eos_token_id", "2"),
        ("add_bos_token", 1),
        ("scores", np.array([np.nan] * 707, np.float32)),
    ],
)
def test_hostile_metadata(byte_level: Make, key: str, value: object) -> None:
    metadata = {**byte_level("gpt-2")[1], f"tokenizer.ggml.{key}": value}
    if key == "tokens" and isinstance(value, list):
        metadata["tokenizer.ggml.token_type"] = np.ones(len(value), np.int32)
        del metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]
    with pytest.raises(VocabularyError, match=r"tokenizer\.ggml\."):
        Tokenizer.from_metadata(metadata)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 2**33),
    st.floats(),
    st.text(max_size=5),
    st.lists(
        st.sampled_from(["a", "b", "ab", "a b", "<0x41>", "<0xZZ>", "<s>", "", " ", "\u2581", "a b c"]),
        max_size=8,
    ),
    st.lists(st.integers(-1, 8), max_size=8).map(lambda v: np.array(v, np.int32)),
    st.lists(st.floats(width=32), max_size=8).map(lambda v: np.array(v, np.float32)),
    st.sampled_from(["gpt2", "llama", "default", "qwen2"]),
)
KEYS = ["model", "pre", "tokens", "token_type", "scores", "merges", "add_bos_token", "add_space_prefix"]
KEYS += [f"{name}_token_id" for name in ("bos", "eos", "eot", "unknown")]


@given(
    st.sampled_from(["gpt2", "llama"]), st.dictionaries(st.sampled_from(KEYS), VALUES), st.text(max_size=20)
)
@settings(max_examples=500, deadline=None)
def test_any_metadata_is_used_or_refused(model: str, changes: dict[str, object], text: str) -> None:
    base: dict[str, object] = {
        "model": model,
        "tokens": ["<unk>", "<s>", "</s>", "<0x41>", "a", "b", "ab", "\u2581"],
        "token_type": np.array([2, 3, 3, 6, 1, 1, 1, 1], np.int32),
        "scores": np.zeros(8, np.float32),
        "merges": ["a b"],
    }
    metadata = {f"tokenizer.ggml.{k}": v for k, v in {**base, **changes}.items() if v is not None}
    try:
        tokenizer = Tokenizer.from_metadata(metadata)
    except VocabularyError:
        return
    ids = tokenizer.encode_prompt(text, special=True)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    tokenizer.decode(range(tokenizer.vocab_size), special=True)


@pytest.mark.parametrize("token", [-1, 49152, 2**31])
def test_ids_outside_the_vocabulary(default_model: TextModel, token: int) -> None:
    for call in (default_model.tokenizer.token_bytes, default_model.tokenizer.is_control):
        with pytest.raises(IndexError):
            call(token)
