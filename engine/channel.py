"""Typed messages between two processes over a unix socket: the only file that knows ZeroMQ.

The callee binds a ROUTER (`Server`), callers connect DEALERs (`Client`). A message is two frames: the
sender's epoch (16 random bytes a process) and the msgpack body, a tagged msgspec struct checked against the
union that the receiver names. What does not decode is counted and dropped. Nothing blocks: a full queue
raises Full, a peer that is not there PeerGone.

A Client has one socket, and so one identity, for each connection: what had been queued for a peer that died
goes down with its socket and never reaches the next one. A socket belongs to one thread; `recv` waits on that
thread's event loop, `poll` without one. ZeroMQ's file descriptor is edge-triggered and any call on the socket
may use the edge up, hence the look at EVENTS after every send.
"""

import asyncio
import os
import secrets
import stat
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq
from zmq.utils.monitor import parse_monitor_message

M = TypeVar("M")

EPOCH = secrets.token_bytes(16)
"""Of this process; frame 0 of all it sends."""

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_PATH_BYTES = 107  # sockaddr_un.sun_path, less the NUL
_POLLIN = int(zmq.POLLIN)  # as an enumeration it would cost more than the call that it is compared with
_QUEUE_MESSAGES = 4096
_LINGER_MS = 500
_RECONNECT_MS = 20
_RECONNECT_MAX_MS = 250


class PeerGone(ConnectionError):
    """There is no such peer, or it is not connected (any more). The message was not sent."""


class Full(ConnectionError):
    """The peer has not read the last messages: the queue is full. The message was not sent."""


class Lost(msgspec.Struct, frozen=True):
    """The connection broke. What the peer had sent has been received; what was sent to it may be lost."""


class Back(msgspec.Struct, frozen=True):
    """The connection stands, for the first time or again after Lost. Say Hello."""


class _Socket(Generic[M]):
    """One ZeroMQ socket with its limits, its codec, and a wait for its file descriptor."""

    def __init__(self, kind: int, decode_type: Any) -> None:
        """`decode_type` is the union of message structs that may arrive: M."""
        self.malformed = 0
        """Messages dropped because they could not be read."""
        self._kind = kind
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(decode_type)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._socket = self._new_socket()

    def _new_socket(self) -> "zmq.Socket[bytes]":
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(self._kind)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.SNDHWM, _QUEUE_MESSAGES)
        socket.setsockopt(zmq.RCVHWM, _QUEUE_MESSAGES)
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        return socket

    def _send(self, head: list[bytes], message: msgspec.Struct) -> None:
        body = self._encoder.encode(message)
        if len(body) > MAX_MESSAGE_BYTES:
            name = type(message).__name__
            raise ValueError(f"{name} of {len(body)} bytes: at most {MAX_MESSAGE_BYTES} can be sent")
        try:
            self._socket.send_multipart([*head, EPOCH, body], zmq.NOBLOCK)
        finally:
            self._wake_if_ready()

    def _take_frames(self) -> list[bytes] | None:
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None

    def _decode(self, frames: list[bytes]) -> M | None:
        """The message of [epoch, body], or None for anything else."""
        if len(frames) == 2 and len(frames[0]) == len(EPOCH):
            try:
                return self._decoder.decode(frames[1])
            except (msgspec.MsgspecError, ValueError, RecursionError, MemoryError):
                pass  # from whoever can open our socket: it is worth a count, not a traceback
        self.malformed += 1
        return None

    async def _wait(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._watch(self._loop)
        self._waiter = self._loop.create_future()
        # The edge may have passed before the descriptor was watched.
        self._wake_if_ready()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_reader(_fd(self._socket), self._wake_if_ready)

    def _unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(_fd(self._socket))

    def _ready(self) -> bool:
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & _POLLIN)

    def _wake_if_ready(self) -> None:
        # EVENTS is asked even when nobody waits: it is what clears the descriptor.
        if self._ready() and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Close; what was sent last is still delivered within half a second. May be called twice."""
        if self._socket.closed:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._unwatch(self._loop)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(PeerGone("the channel was closed"))
        self._shut(None)

    def _shut(self, linger: int | None) -> None:
        self._socket.close(linger)


class Server(_Socket[M]):
    """The end that is called: many peers, each known by the identity of its connection."""

    def __init__(self, path: str, decode_type: Any) -> None:
        """Bind `path`, whose folder must be ours alone (0700).

        Errors: ValueError for a path that is too long, PermissionError for the folder, OSError from bind.
        """
        super().__init__(zmq.ROUTER, decode_type)
        self._alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._alarm, zmq.POLLIN)
        try:
            _check_path(path)
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._socket.bind(f"ipc://{path}")
            os.chmod(path, 0o600)
        except BaseException:
            self._shut(None)
            raise

    def send(self, peer: bytes, message: msgspec.Struct) -> None:
        """Errors: PeerGone, Full."""
        try:
            self._send([peer], message)
        except zmq.Again:
            raise Full(f"peer {peer.hex()} does not read") from None
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            raise PeerGone(f"peer {peer.hex()} is gone") from None

    async def recv(self) -> tuple[bytes, M]:
        """The next message and who sent it. One task at a time."""
        while True:
            if (received := self._take()) is not None:
                return received
            await self._wait()

    def poll(self, timeout: float | None) -> tuple[bytes, M] | None:
        """`recv` without an event loop: None after `timeout` seconds (0: at once; None: never), or `wake`."""
        if (received := self._take()) is None and timeout != 0:
            events = self._poller.poll(None if timeout is None else int(timeout * 1000))
            if any(who == self._alarm for who, _ in events):
                os.eventfd_read(self._alarm)
            received = self._take()
        return received

    def wake(self) -> None:
        """End the `poll` that waits, or the next that would. For any thread."""
        os.eventfd_write(self._alarm, 1)

    def _shut(self, linger: int | None) -> None:
        super()._shut(linger)
        os.close(self._alarm)

    def _take(self) -> tuple[bytes, M] | None:
        while (frames := self._take_frames()) is not None:
            if (message := self._decode(frames[1:])) is not None:
                return frames[0], message
        return None


class Client(_Socket[M]):
    """The end that calls: one peer, which may come and go."""

    def __init__(self, path: str, decode_type: Any) -> None:
        """Connects in the background, now and again after each loss; see Back and Lost."""
        self.stale = 0
        """Messages dropped because their epoch was not that of this connection's peer."""
        self._path = path
        self._peer_epoch: bytes | None = None
        self._there = self._came = self._went = False
        super().__init__(zmq.DEALER, decode_type)

    def _new_socket(self) -> "zmq.Socket[bytes]":
        socket = super()._new_socket()
        socket.setsockopt(zmq.IDENTITY, secrets.token_bytes(16))
        # Not IMMEDIATE: libzmq 4.3.5 then drops what a dead peer had sent, and aborts in mid-message.
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS)
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        socket.connect(f"ipc://{self._path}")
        return socket

    def send(self, message: msgspec.Struct) -> None:
        """Errors: PeerGone (also before the first Back, and from the moment of the break), Full."""
        self._read_monitor()
        if not self._there:
            raise PeerGone(f"{self._path} is not connected")
        try:
            self._send([], message)
        except zmq.Again:
            raise Full(f"{self._path} does not read") from None

    async def recv(self) -> M | Lost | Back:
        """The next message, or news of the connection. One task at a time."""
        while True:
            if (received := self._take()) is not None:
                return received
            await self._wait()

    def _take(self) -> M | Lost | Back | None:
        if self._came:
            self._came = False
            return Back()
        while (frames := self._take_frames()) is not None:
            message = self._decode(frames)
            if message is None:
                continue
            if self._peer_epoch is None:
                self._peer_epoch = frames[0]
            if frames[0] == self._peer_epoch:
                return message
            self.stale += 1
        if self._went:
            self._reopen()
            return Lost()
        return None

    def _ready(self) -> bool:
        return super()._ready() or self._came or self._went

    def _read_monitor(self) -> None:
        while int(self._monitor.getsockopt(zmq.EVENTS)) & _POLLIN:
            event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                # ZeroMQ may have reconnected this socket before we looked: then it was lost all the same.
                self._there = self._came = not self._went
            elif self._there:  # a connection refused before its handshake was none
                self._there, self._went = False, True
        self._wake_if_ready()

    def _reopen(self) -> None:
        """A new socket with a new identity: nothing queued for the old peer reaches the new one."""
        if self._loop is not None:
            self._unwatch(self._loop)
        self._shut(0)
        self._peer_epoch = None
        self._there = self._came = self._went = False
        self._socket = self._new_socket()
        if self._loop is not None:
            self._watch(self._loop)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        super()._watch(loop)
        loop.add_reader(_fd(self._monitor), self._read_monitor)
        self._read_monitor()

    def _unwatch(self, loop: asyncio.AbstractEventLoop) -> None:
        super()._unwatch(loop)
        loop.remove_reader(_fd(self._monitor))

    def _shut(self, linger: int | None) -> None:
        # In this order: an event for a monitor that nobody reads blocks ZeroMQ's I/O thread for ever.
        self._socket.disable_monitor()
        self._monitor.close()
        super()._shut(linger)


def _fd(socket: "zmq.Socket[bytes]") -> int:
    return int(socket.getsockopt(zmq.FD))


def _check_path(path: str) -> None:
    if len(os.fsencode(path)) > MAX_PATH_BYTES:
        raise ValueError(f"socket path is longer than {MAX_PATH_BYTES} bytes: {path}")
    folder = Path(path).parent
    info = folder.stat()
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise PermissionError(f"{folder} must belong to this user alone (mode 0700): a socket will be in it")
