"""Chat templates: the Jinja program in a model file that writes a conversation as the model learnt it.

They run in one child process per model (template_worker.py says why, and what it may not do), started at the
first use, kept warm, and killed and replaced when a rendering takes longer than a second. A rendering costs
about 0.1 ms.
"""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from typing import Final

import msgspec

from ktransformers.server.text import template_worker

SECONDS: Final = 1.0
"""Wall time of one rendering."""
START_SECONDS: Final = 20.0
"""For the child to start: importing takes 0.1 s, on a machine that is loading a model more."""
_MARGIN: Final = 0.5
"""The child's own timer ends it first; this is for a child that hangs otherwise."""
_LENGTH: Final = struct.Struct("<I")

CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3: Final = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA: Final = (
    "{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user')"
    " + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
FALLBACKS: Final = (
    ("<|im_start|>", CHATML),
    ("<|start_header_id|>", LLAMA3),
    ("<start_of_turn>", GEMMA),
)
"""For a file without a template: by a control token that only one format has. They know no tools."""


class TemplateError(ValueError):
    """The conversation cannot be rendered. The message may be shown to the client."""


class ChatTemplate:
    """One template in its child process. May be used from any thread; renderings go one after the other."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._lock = threading.Lock()
        self._worker: _Worker | None = None
        self._variables: frozenset[str] | None = None
        self._invalid = ""
        """Why the template does not compile, once that is known."""

    def render(self, context: dict[str, object], max_chars: int) -> str:
        """The template's text for `context`: JSON values, strings without lone surrogates.

        Blocks for at most SECONDS after those before it, and START_SECONDS more when the child has to be
        started: not for an event loop. TemplateError when the template refuses the conversation, fails,
        writes more than `max_chars` characters or takes too long; the next call finds a fresh child.
        """
        request = msgspec.json.encode({"context": context, "max_chars": max_chars})
        if len(request) > template_worker.MAX_MESSAGE:
            raise TemplateError("the conversation is too long")
        with self._lock:
            try:
                return _text_of(self._started().call(request, SECONDS))
            except _WorkerDiedError as e:
                self._worker = None
                raise TemplateError(f"the model's chat template {e}") from None

    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not make itself. Blocks as `render` does, once.
        TemplateError when the template is not valid."""
        with self._lock:
            if self._variables is None:
                try:
                    self._variables = self._started().variables
                except _WorkerDiedError as e:
                    raise TemplateError(f"the model's chat template {e}") from None
            return self._variables

    def _started(self) -> "_Worker":
        """The child. Raises TemplateError, _WorkerDiedError."""
        if self._invalid:
            raise TemplateError(self._invalid)
        if self._worker is None:
            try:
                self._worker = _Worker(self.source)
            except _InvalidTemplateError as e:
                self._invalid = str(e)
                raise TemplateError(self._invalid) from None
        return self._worker

    def close(self) -> None:
        """End the child process. A later `render` starts another."""
        with self._lock:
            if self._worker is not None:
                self._worker.kill()
                self._worker = None


def _text_of(reply: bytes) -> str:
    status, text = reply[:1], reply[1:].decode()
    if status == template_worker.DONE:
        return text
    if status == template_worker.REFUSED:
        raise TemplateError(f"the model's chat template refuses the conversation: {text}")
    if text == template_worker.TooLongError.__name__:
        raise TemplateError("the model's chat template writes too much text")
    raise TemplateError(f"the model's chat template fails on this conversation ({text})")


class _WorkerDiedError(Exception):
    """The child is gone; the message says why, to follow the words "the model's chat template"."""


class _InvalidTemplateError(Exception):
    """The template does not compile."""


class _Worker:
    """The child process and the socket to it."""

    def __init__(self, source: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-SsPB", template_worker.__file__, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                # Nothing of ours that a template could find: no keys, no paths but those of modules.
                env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **_time_zone()},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._socket = ours
        reply = self.call(msgspec.json.encode({"template": source, "seconds": SECONDS}), START_SECONDS)
        if reply[:1] != template_worker.DONE:
            self.kill()
            raise _InvalidTemplateError(f"the model's chat template is not valid ({reply[1:].decode()})")
        self.variables = frozenset(msgspec.json.decode(reply[1:], type=list[str]))

    def call(self, request: bytes, seconds: float) -> bytes:
        """Send one message and return the reply. On _WorkerDiedError the child has been killed."""
        deadline = time.monotonic() + seconds + _MARGIN
        try:
            self._socket.settimeout(seconds + _MARGIN)
            self._socket.sendall(_LENGTH.pack(len(request)) + request)
            (size,) = _LENGTH.unpack(self._receive(_LENGTH.size, deadline))
            if not 1 <= size <= template_worker.MAX_MESSAGE:
                raise EOFError
            return self._receive(size, deadline)
        except TimeoutError:
            self.kill()
            raise _WorkerDiedError("takes too long") from None
        except (EOFError, OSError):
            # When the socket closed before the exit status can be read, the child is about to end by itself.
            ended = self.kill(grace=0.2)
            raise _WorkerDiedError("takes too long" if ended == -signal.SIGALRM else "crashed") from None

    def _receive(self, size: int, deadline: float) -> bytes:
        buffer = bytearray(size)
        view = memoryview(buffer)
        while view:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            n = self._socket.recv_into(view)
            if n == 0:
                raise EOFError
            view = view[n:]
        return bytes(buffer)

    def kill(self, grace: float = 0.0) -> int:
        """End the child, if it does not end by itself within `grace` seconds. Returns its exit status."""
        self._socket.close()
        try:
            return self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _time_zone() -> dict[str, str]:
    return {"TZ": os.environ["TZ"]} if "TZ" in os.environ else {}
