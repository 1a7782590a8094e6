"""Log-probabilities as OpenAI's two shapes."""

from collections.abc import Sequence
from typing import Any

from ktransformers.server.deltas import TokenLogprob
from ktransformers.server.text.detokenizer import Pieces

LEAST = -9999.0
"""JSON has no -Infinity; the protocol's own stand-in."""


def _entry(pieces: Pieces, token: int, logprob: float) -> dict[str, Any]:
    raw = pieces.token_bytes(token)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LEAST), "bytes": list(raw)}


def chat(pieces: Pieces, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The shape of chat completions. A token that is not whole UTF-8 by itself shows its bytes."""
    return {
        "content": [
            _entry(pieces, found.token, found.logprob)
            | {"top_logprobs": [_entry(pieces, token, logprob) for token, logprob in found.top]}
            for found in tokens
        ],
        "refusal": None,
    }


def completion(pieces: Pieces, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The shape of legacy completions; `offset` is the number of characters before the first token."""
    texts = [_text(pieces, found.token) for found in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [max(found.logprob, LEAST) for found in tokens],
        "top_logprobs": [
            {_text(pieces, token): max(logprob, LEAST) for token, logprob in found.top} for found in tokens
        ],
        "text_offset": offsets,
    }


def _text(pieces: Pieces, token: int) -> str:
    raw = pieces.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        # As the protocol's server does, so that different broken pieces stay different keys.
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
