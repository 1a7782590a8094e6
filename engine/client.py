"""The scheduler's end of the engine's socket."""

import asyncio
from contextlib import suppress

from ktransformers.engine.channel import Back, Client, Full, Lost, PeerGone
from ktransformers.engine.protocol import FromEngine, Hello, ToEngine

HELLO_SECONDS = 1.0


class EngineClient:
    """One engine, which may die and come back. Says Hello whenever connected, and once a second after."""

    def __init__(self, path: str) -> None:
        """Connects to the engine's socket in the background."""
        self._channel: Client[FromEngine] = Client(path, FromEngine)
        self._beat: asyncio.TimerHandle | None = None

    def send(self, message: ToEngine) -> None:
        """Errors: PeerGone, Full (see channel)."""
        self._channel.send(message)

    async def recv(self) -> FromEngine | Lost | Back:
        """The next message, or news of the connection.

        After Back the engine holds no sequence of ours; what was in flight at Lost is never answered.
        """
        received = await self._channel.recv()
        if isinstance(received, Back):
            self._hello()
        elif isinstance(received, Lost) and self._beat is not None:
            self._beat.cancel()
        return received

    def _hello(self) -> None:
        # PeerGone: recv is about to say Lost. Full: the engine has more than enough to read.
        with suppress(PeerGone, Full):
            self._channel.send(Hello())
        self._beat = asyncio.get_running_loop().call_later(HELLO_SECONDS, self._hello)

    def close(self) -> None:
        """Disconnect."""
        if self._beat is not None:
            self._beat.cancel()
        self._channel.close()
