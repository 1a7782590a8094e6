"""Who is let into the queue: every number is checked again here, whoever checked it before. What is let in
the engine takes: what it refuses fails in the middle of a step, which costs the others of that step.

The API refuses bad parameters with better words. This is the boundary behind which all code may rely on
them, and it holds for every front end (a second one that forgot a check has undone fixes elsewhere).
"""

import math
import zlib
from dataclasses import dataclass

import msgspec

from ktransformers.scheduler.protocol import Failed, Sampling, Submit

_MAX_ID = 128
_MAX_TENANT = 512
_MAX_SCOPE = 128
_WEIGHTS = (0.001, 1000.0)
_MAX_BIASES = 300
_MAX_STOPS = 512
"""As many as a client may name, and the model's own."""
_MAX_BIAS = 1e6
_MAX_LOGPROBS = 20
_RETRY_SECONDS = (1.0, 120.0)


@dataclass(frozen=True)
class Limits:
    """What the engine can take."""

    max_len: int
    """Tokens of prompt and output together. The pool holds as many: whatever is let in can run alone."""
    vocab: int


class Refused(Exception):
    """The request cannot be taken; `code` is one of Failed's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def check(submit: Submit, limits: Limits) -> Sampling:
    """Its sampling, clipped to what fits. Errors: Refused."""
    _check_tokens(submit, limits)
    if wrong := _wrong(submit, limits):
        raise Refused("invalid_request", wrong)
    sampling = submit.sampling
    most = min(sampling.max_tokens, limits.max_len - len(submit.tokens))
    return msgspec.structs.replace(
        sampling,
        max_tokens=most,
        min_tokens=min(sampling.min_tokens, most),
        top_k=min(sampling.top_k, limits.vocab),
        repetition_window=min(sampling.repetition_window, limits.max_len),
    )


def _check_tokens(submit: Submit, limits: Limits) -> None:
    if not submit.tokens:
        raise Refused("invalid_request", "the prompt is empty")
    if len(submit.tokens) >= limits.max_len:
        raise Refused(
            "context_length_exceeded",
            f"the prompt has {len(submit.tokens)} tokens, and at most {limits.max_len - 1} fit",
        )
    if min(submit.tokens) < 0 or max(submit.tokens) >= limits.vocab:
        raise Refused("invalid_request", f"a prompt token is outside the vocabulary of {limits.vocab}")


def _wrong(submit: Submit, limits: Limits) -> str:
    """What is out of bounds, or ""."""
    s, tenant = submit.sampling, submit.tenant

    def in_vocab(token: int) -> bool:
        return 0 <= token < limits.vocab

    bounds = {
        "id": 0 < len(submit.id) <= _MAX_ID,
        "tenant": len(tenant.id) <= _MAX_TENANT and len(tenant.user) <= _MAX_TENANT,
        "weight": _WEIGHTS[0] <= tenant.weight <= _WEIGHTS[1],
        "tenant limits": min(tenant.max_running, tenant.max_waiting, tenant.max_waiting_tokens) >= 0,
        "kv_bytes": min(tenant.kv_bytes) >= 0,
        "cache_scope": len(submit.cache_scope) <= _MAX_SCOPE,
        "deadline": math.isfinite(submit.deadline) and submit.deadline >= 0,
        "temperature": 0 <= s.temperature <= 100,
        "top_k": s.top_k >= 0,
        "top_p": 0 < s.top_p <= 1,
        "min_p": 0 <= s.min_p <= 1,
        "repetition_penalty": 1e-3 <= s.repetition_penalty <= 1e3,
        "repetition_window": s.repetition_window >= 0,
        "presence_penalty": abs(s.presence_penalty) <= 1e3,
        "frequency_penalty": abs(s.frequency_penalty) <= 1e3,
        "seed": 0 <= s.seed < 1 << 63,
        "max_tokens": s.max_tokens >= 1,
        "min_tokens": 0 <= s.min_tokens <= s.max_tokens,
        "logprobs": -1 <= s.logprobs <= _MAX_LOGPROBS,
        "stop_tokens": len(s.stop_tokens) <= _MAX_STOPS and all(map(in_vocab, s.stop_tokens)),
        # -inf bans a token.
        "logit_bias": len(s.logit_bias) <= _MAX_BIASES
        and all(
            in_vocab(token) and (abs(bias) <= _MAX_BIAS or bias == -math.inf) for token, bias in s.logit_bias
        ),
    }
    return ", ".join(f"{name} is out of bounds" for name, good in bounds.items() if not good)


def overloaded(request_id: str, drain_seconds: float) -> Failed:
    """The server is full."""
    retry_after = _retry(request_id, drain_seconds)
    return Failed(request_id, "overloaded", "too many requests are waiting", retry_after)


def rate_limited(request_id: str, drain_seconds: float) -> Failed:
    """The tenant has as much waiting as it may."""
    retry_after = _retry(request_id, drain_seconds)
    return Failed(request_id, "rate_limited", "too many of your requests are waiting", retry_after)


def _retry(request_id: str, drain_seconds: float) -> float:
    """Seconds; spread, so that those refused together do not return together."""
    spread = 1 + zlib.crc32(request_id.encode()) / (1 << 32) / 2
    least, most = _RETRY_SECONDS
    return min(max(math.ceil(drain_seconds) * spread, least), most)
