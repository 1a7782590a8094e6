"""JSON as the protocols' clients read it."""

import re
from typing import Any

import msgspec

# NEL, LINE SEPARATOR, PARAGRAPH SEPARATOR: valid in JSON as they are, but clients that take a stream apart
# with str.splitlines (httpx, and so ollama's and many an OpenAI client) would cut an event in two.
_SEPARATORS = re.compile(b"\xc2\x85|\xe2\x80[\xa8\xa9]")
_ESCAPES = {b"\xc2\x85": rb"\u0085", b"\xe2\x80\xa8": rb"\u2028", b"\xe2\x80\xa9": rb"\u2029"}
_to_json = msgspec.json.Encoder().encode


def encode(value: Any) -> bytes:
    """`value` as JSON on one line, whatever a reader takes for the end of a line."""
    found = _to_json(value)
    return found if found.isascii() else _SEPARATORS.sub(lambda match: _ESCAPES[match[0]], found)
