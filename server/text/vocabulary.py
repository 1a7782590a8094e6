"""The vocabulary of a model, checked and typed: from the keys `tokenizer.ggml.*` of a GGUF file. (folder.py
makes one from a tokenizer.json.)"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from ktransformers.server.text.special_tokens import Matching

MAX_TOKENS: Final = 2**21
MAX_TOKEN_CHARS: Final = 1024
MAX_CHARS: Final = 32 * 2**20
"""All tokens together. With the two bounds above it caps the work that a hostile file can cause at load."""


_NONE: Final = 0xFFFFFFFF
"""-1 as u32: how some converters write that there is no such token."""
_BYTE: Final = re.compile("<0x[0-9A-Fa-f]{2}>")


class VocabularyError(ValueError):
    """The file's vocabulary cannot be used. One line that names the key and what is wrong."""


class TokenType(IntEnum):
    """The numbers of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Texts that end a turn or a document in the model families that we know. A family's file names at most one or
# two of its own in metadata, and a chat model that misses one of them talks on with itself. (llama.cpp does
# the same.)
_END_TEXTS: Final = frozenset(
    {
        *(
            "<|eot_id|>",
            "<|im_end|>",
            "<|end|>",
            "<|return|>",
            "<|call|>",
            "<|flush|>",
            "<|calls|>",
            "<end_of_turn>",
        ),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
        *("<end_of_utterance>", "<eos>", "<turn|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
        # Padding and file separators of fill-in-the-middle training: what follows is another document.
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>"),
        *("<reponame>", "<|file_sep|>", "<PAD>", "[PAD]"),
    }
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id. Ids that the file does not set are None."""

    model: str
    """`tokenizer.ggml.model`: "gpt2" is byte-level BPE, "llama" SentencePiece BPE."""
    pre: str
    tokens: list[str]
    types: list[int]
    """TokenType of each token."""
    scores: npt.NDArray[np.float32] | None
    merges: list[str]
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    unk_id: int | None
    pad_id: int | None
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool | None
    end_ids: frozenset[int]
    """Tokens that end generation."""
    matching: Mapping[str, Matching] = field(default_factory=dict)
    """How control tokens are looked for, of those that are not just looked for."""

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> "Vocabulary":
        """Raises VocabularyError."""
        model = _text(metadata, "tokenizer.ggml.model")
        tokens = _strings(metadata, "tokenizer.ggml.tokens")
        check_tokens(tokens)
        eos_id = _id(metadata, "eos", len(tokens))
        eot_id = _id(metadata, "eot", len(tokens))
        types = _types(metadata, tokens)
        named = (eos_id, eot_id, _id(metadata, "eom", len(tokens)))
        end_ids = find_end_ids(tokens, types, {i for i in named if i is not None})
        for i in end_ids:
            types[i] = TokenType.CONTROL
        return cls(
            model=model,
            pre=_text(metadata, "tokenizer.ggml.pre", "default"),
            tokens=tokens,
            types=types,
            scores=_scores(metadata, len(tokens)),
            merges=_strings(metadata, "tokenizer.ggml.merges", []),
            bos_id=_id(metadata, "bos", len(tokens)),
            eos_id=eos_id,
            eot_id=eot_id,
            unk_id=_id(metadata, "unknown", len(tokens)),
            pad_id=_id(metadata, "padding", len(tokens)),
            add_bos=_flag(metadata, "tokenizer.ggml.add_bos_token"),
            add_eos=_flag(metadata, "tokenizer.ggml.add_eos_token"),
            add_space_prefix=_flag(metadata, "tokenizer.ggml.add_space_prefix"),
            end_ids=end_ids,
        )


def _text(metadata: Mapping[str, object], key: str, default: str | None = None) -> str:
    value = metadata.get(key, default)
    if value is None:
        raise VocabularyError(f"{key}: missing: the file holds no tokenizer")
    if not isinstance(value, str):
        raise VocabularyError(f"{key}: not a string")
    return value


def _strings(metadata: Mapping[str, object], key: str, default: list[str] | None = None) -> list[str]:
    value = metadata.get(key, default)
    if value is None:
        raise VocabularyError(f"{key}: missing: the file holds no tokenizer")
    if not isinstance(value, list):
        raise VocabularyError(f"{key}: not an array of strings")
    return value


def _flag(metadata: Mapping[str, object], key: str) -> bool | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, bool):
        raise VocabularyError(f"{key}: not a bool")
    return value


def _id(metadata: Mapping[str, object], name: str, count: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None or (type(value) is int and value == _NONE):
        return None
    if type(value) is not int or not 0 <= value < count:
        raise VocabularyError(f"{key}: {value!r:.40} is not the id of a token (there are {count})")
    return value


def check_tokens(tokens: list[str]) -> None:
    """Raises VocabularyError for a vocabulary that would cost too much."""
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise VocabularyError(f"tokenizer.ggml.tokens: {len(tokens)} tokens, not 1 to {MAX_TOKENS}")
    if (longest := max(map(len, tokens))) > MAX_TOKEN_CHARS:
        raise VocabularyError(
            f"tokenizer.ggml.tokens: a token of {longest} characters, more than {MAX_TOKEN_CHARS}"
        )
    if (total := sum(map(len, tokens))) > MAX_CHARS:
        raise VocabularyError(f"tokenizer.ggml.tokens: {total} characters in all, more than {MAX_CHARS}")


def is_byte_token(text: str) -> bool:
    """Whether a SentencePiece token stands for one byte: "<0x0A>"."""
    return _BYTE.fullmatch(text) is not None


def _types(metadata: Mapping[str, object], tokens: list[str]) -> list[int]:
    count = len(tokens)
    key = "tokenizer.ggml.token_type"
    value = metadata.get(key)
    if value is None:
        return [int(TokenType.NORMAL)] * count
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != count:
        raise VocabularyError(f"{key}: not an array of {count} integers")
    types: list[int] = value.tolist()
    for token, kind in zip(tokens, types, strict=True):
        if kind == TokenType.BYTE and not is_byte_token(token):
            raise VocabularyError(f"{key}: {token!r:.80} is no byte token")
    return types


def _scores(metadata: Mapping[str, object], count: int) -> npt.NDArray[np.float32] | None:
    key = "tokenizer.ggml.scores"
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf" or len(value) != count:
        raise VocabularyError(f"{key}: not an array of {count} numbers")
    scores = value.astype(np.float32)
    if not np.isfinite(scores).all():
        raise VocabularyError(f"{key}: a score is not finite")
    return scores


def find_end_ids(tokens: list[str], types: list[int], named: set[int]) -> frozenset[int]:
    """Ids of tokens that end generation: those that metadata names, and known texts.

    A known text counts when its type says that it is no ordinary text: "</s>" is HTML in many a vocabulary.
    """
    special = (TokenType.CONTROL, TokenType.USER_DEFINED)
    found = {tokens[i]: i for i, kind in enumerate(types) if kind in special and tokens[i] in _END_TEXTS}
    # In the harmony format of gpt-oss (and solar's) "<|end|>" ends one message of an answer, not the answer.
    if found.keys() & {"<|return|>", "<|flush|>"} and found.keys() & {"<|call|>", "<|calls|>"}:
        found.pop("<|end|>", None)
    return frozenset(named | set(found.values()))
