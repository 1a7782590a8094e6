"""The body of a request: bounded while it arrives, and strict JSON."""

import asyncio
import re
from typing import Any

import msgspec
from starlette.requests import Request

from ktransformers.server.errors import RequestError

MAX_BODY_BYTES = 16 << 20
MAX_BODIES_BYTES = 256 << 20
"""All bodies being read at one time."""
MAX_JSON_DEPTH = 32
MAX_JSON_NODES = 100_000
"""Lists, objects and keys of one document: what takes memory and time far beyond its bytes."""
MAX_JSON_VALUES = 1_100_000
"""Of one document, as of a list of token ids. Commas and quotes within a text are taken for such: a text with
more of them fits no context."""
BODY_SECONDS = 30.0

_STRINGS = re.compile(rb'"[^"]*"')
_TO_SQUARE = bytes.maketrans(b"{}", b"[]")
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{}:"))


class BoundedRequest(Request):
    """A request whose body is bounded while it arrives (chunked or not) and is strict JSON."""

    held = 0

    _document: Any = None

    async def body(self) -> bytes:
        """Read the body and decode it. Of its bytes only the first is given out: the framework asks whether
        there are any, and would keep all of them until the answer is complete. Raises RequestError:
        request_too_large, request_timeout, overloaded, invalid_json.
        """
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length[:19]) > MAX_BODY_BYTES:
            raise _too_large()
        read = await self._read()
        if read:
            self._document = strict_json(read)
        return read[:1]

    async def _read(self) -> bytes:
        chunks, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in self.stream():
                    size += len(chunk)
                    BoundedRequest.held += len(chunk)
                    if size > MAX_BODY_BYTES:
                        raise _too_large()
                    if BoundedRequest.held > MAX_BODIES_BYTES:
                        raise RequestError("overloaded", "too many large requests at the same time")
                    chunks.append(chunk)
        except TimeoutError:
            raise RequestError(
                "request_timeout", f"the body did not arrive within {BODY_SECONDS:.0f} s"
            ) from None
        finally:
            BoundedRequest.held -= size
        return b"".join(chunks)

    async def json(self) -> Any:
        """What `body` decoded."""
        return self._document

    def check_media_type(self) -> None:
        """A form or plain text is what a foreign page may post without asking first, so only JSON is
        taken, and it must not be compressed.
        """
        if self.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError("unsupported_media_type", "send JSON, with 'Content-Type: application/json'")
        if self.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise RequestError("unsupported_media_type", "send the body as it is, without 'Content-Encoding'")


def strict_json(body: bytes) -> Any:
    """Decode a JSON document: UTF-8, no NaN or Infinity, nested no deeper than MAX_JSON_DEPTH. Raises
    RequestError "invalid_json".
    """
    _check_structure(body)
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("invalid_json", f"the body is not valid JSON{_place(error)}") from None


def _place(error: Exception) -> str:
    """Where a document is wrong, without a word of what is in it."""
    if isinstance(error, UnicodeDecodeError) or "UTF-8" in str(error):  # the first until msgspec 0.22
        return ": a text in it is not UTF-8"
    at = re.search(r"\(byte (\d+)\)$", str(error))
    return "" if at is None else f", from byte {at[1]} on"


def _check_structure(body: bytes) -> None:
    """Bound depth, nodes and values before anything is built. A few passes in C over the bytes, whatever they
    are."""
    if body.count(b",") > MAX_JSON_VALUES or body.count(b'"') > 2 * MAX_JSON_VALUES:
        raise RequestError("invalid_json", f"the JSON has more than {MAX_JSON_VALUES} values")
    if body.count(b"[") + body.count(b"{") + body.count(b":") <= MAX_JSON_DEPTH:
        return
    outside = _STRINGS.sub(b"", body.replace(b"\\\\", b"").replace(b'\\"', b""))
    structure = outside.translate(_TO_SQUARE, _NOT_STRUCTURE)
    nodes = structure.count(b"[") + structure.count(b":")
    if nodes > MAX_JSON_NODES:
        raise RequestError("invalid_json", f"the JSON has more than {MAX_JSON_NODES} lists, objects and keys")
    brackets = structure.replace(b":", b"")
    for _ in range(MAX_JSON_DEPTH):  # each round takes away exactly the innermost level
        brackets = brackets.replace(b"[]", b"")
    if brackets:
        raise RequestError("invalid_json", f"the JSON is nested deeper than {MAX_JSON_DEPTH}, or not closed")


def _too_large() -> RequestError:
    # The connection stays open for what is still being sent (connections.py says how long): closing it would
    # reset it, and a client that writes before it reads would not see this.
    return RequestError("request_too_large", f"the body is larger than {MAX_BODY_BYTES >> 20} MiB")
