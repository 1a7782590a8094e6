"""The child process in which chat templates run. templates.py starts it by this file's path.

A template is a program from a model file. Jinja's immutable sandbox keeps it from Python's internals, but it
can still compute for ever or fill the memory, in more ways than can be listed, and sandboxes have had holes.
So it runs where that costs nothing: a process with a cap on memory, a timer that kills it, no environment, no
way to open a file or a socket, and nothing to do but turn JSON into text. It imports nothing of ours and
stays warm.

A message is a length (u32, little-endian) and that many bytes. The first request is {"template": source,
"seconds": limit}; each one after it {"context": variables, "max_chars": limit}. A reply is one of the status
bytes below and text: what was rendered, or for the first request a JSON list of the variables that the
template reads; or for "refused" the template's own message, or for "failed" what kind of error it was.
"""

import json
import resource
import signal
import socket
import struct
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

DONE = b"0"
REFUSED = b"1"
FAILED = b"2"
MEMORY_BYTES = 512 * 2**20
MAX_MESSAGE = 128 * 2**20
_LENGTH = struct.Struct("<I")


class RefusedError(Exception):
    """The template called raise_exception."""


class TooLongError(Exception):
    """The output is longer than the request allows."""


class SafeNamespace(Namespace):
    """A namespace without names that Python itself reads: the sandbox checks look-ups, not these."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            SafeNamespace._check(name)  # not self: there attributes are the contents
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        SafeNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r:.40}")


class Generation(Extension):
    """{% generation %} marks the model's own words for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (declared so by jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """The names and settings that chat templates are written for: those of Hugging Face's transformers."""

    def raise_exception(message: object) -> None:
        raise RefusedError(str(message))

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Not jinja's own, which escapes for HTML.
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0
    )
    del env.globals["lipsum"]
    env.globals["namespace"] = SafeNamespace
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    env.filters["tojson"] = tojson
    return env


def render(template: jinja2.Template, context: dict[str, Any], max_chars: int) -> str:
    """The output, given up as soon as it is longer than `max_chars`."""
    parts = []
    size = 0
    for part in template.generate(context):
        size += len(part)
        if size > max_chars:
            raise TooLongError
        parts.append(part)
    return "".join(parts)


def receive(connection: socket.socket) -> bytes | None:
    """The next message; None when the other end has closed."""
    header = connection.recv(_LENGTH.size, socket.MSG_WAITALL)
    if len(header) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(header)
    if size > MAX_MESSAGE:
        return None
    body = connection.recv(size, socket.MSG_WAITALL)
    return body if len(body) == size else None


def send(connection: socket.socket, body: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(body)) + body)


def _confine(highest_fd: int) -> None:
    """Give up what rendering does not need. Reading goes on through descriptors that are open already."""
    for what, limit in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, highest_fd + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        if hard == resource.RLIM_INFINITY or limit < hard:
            resource.setrlimit(what, (limit, limit))


def serve(connection: socket.socket) -> None:
    """Answer requests until the other end closes. A failure is answered, too, and leaves nothing behind."""
    env = environment()
    template: jinja2.Template | None = None
    seconds = 1.0
    while (body := receive(connection)) is not None:
        # Kills this process (the signal's default action) even when nobody is left to do so.
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            request = json.loads(body)
            if template is None:
                seconds = float(request["seconds"])
                template = env.from_string(request["template"])
                names = meta.find_undeclared_variables(env.parse(request["template"]))
                reply = DONE + json.dumps(sorted(names)).encode()
            else:
                text = render(template, request["context"], request["max_chars"])
                reply = DONE + text.encode("utf-8", "replace")
        except RefusedError as e:
            reply = REFUSED + str(e)[:300].encode("utf-8", "replace")
        except MemoryError:
            reply = FAILED + b"MemoryError"
        except Exception as e:
            reply = FAILED + type(e).__name__.encode("utf-8", "replace")
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(connection, reply)


def main() -> None:
    fd = int(sys.argv[1])
    connection = socket.socket(fileno=fd)
    _confine(fd)
    serve(connection)


if __name__ == "__main__":
    main()
