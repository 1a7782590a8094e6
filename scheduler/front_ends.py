"""The front ends: what is to be said to each, and whether it is still there."""

from collections.abc import Callable

from ktransformers.scheduler.protocol import Failed, FromScheduler, Status, TokenEvent, Tokens

SILENT_SECONDS = 3.0
"""A front end that has not said Hello for so long is gone."""

Send = Callable[[bytes, FromScheduler], bool]
"""Send a message to a peer; False when that peer is gone."""


class FrontEnds:
    """Peers of the scheduler's socket. Token events are collected, and sent as one message a peer by
    `flush`."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._heard_at: dict[bytes, float] = {}
        self._events: dict[bytes, list[TokenEvent]] = {}
        self._lost: set[bytes] = set()

    def heard(self, peer: bytes, now: float) -> None:
        """It said something."""
        self._heard_at[peer] = now

    def slept(self, seconds: float) -> None:
        """This process stood still for so long: what they said meanwhile is yet to be read."""
        for peer in self._heard_at:
            self._heard_at[peer] += seconds

    def tell(self, peer: bytes, message: Status | Failed | TokenEvent) -> None:
        """Say it: an event at the next flush, anything else at once, but after the events before it."""
        if isinstance(message, TokenEvent):
            self.tell_event(peer, message)
            return
        if (events := self._events.pop(peer, None)) is not None:
            self._send_now(peer, Tokens(events))
        self._send_now(peer, message)

    def tell_event(self, peer: bytes, event: TokenEvent) -> None:
        """Say it at the next flush."""
        events = self._events.get(peer)
        if events is None:
            self._events[peer] = [event]
        else:
            events.append(event)

    def tell_all(self, message: Status) -> None:
        """Say it to everybody."""
        for peer in self._heard_at:
            self.tell(peer, message)

    def flush(self) -> None:
        """Send what was collected."""
        for peer, events in self._events.items():
            self._send_now(peer, Tokens(events))
        self._events.clear()

    def _send_now(self, peer: bytes, message: FromScheduler) -> None:
        if not self._send(peer, message):
            self._lost.add(peer)

    def take_lost(self) -> set[bytes]:
        """Those to whom nothing could be sent, each told once."""
        lost, self._lost = self._lost, set()
        return {peer for peer in lost if self._heard_at.pop(peer, None) is not None}

    def take_silent(self, now: float) -> set[bytes]:
        """Those not heard of for too long, each told once. Ask after `slept`: nobody is silent for that."""
        silent = {peer for peer, at in self._heard_at.items() if now - at > SILENT_SECONDS}
        for peer in silent:
            del self._heard_at[peer]
        return silent
