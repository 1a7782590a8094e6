"""`python -m ktransformers.server CONFIG.json`: the API process. The supervisor starts it."""

import asyncio
import errno
import gc
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import uvicorn
import uvloop
from fastapi import FastAPI

from ktransformers.engine.child import die_with_parent
from ktransformers.engine.logs import log_loop_error, start_logging
from ktransformers.scheduler.client import SchedulerClient
from ktransformers.server.app import make_admin_app, make_app
from ktransformers.server.auth import AdminKeys, Keys
from ktransformers.server.config import ADMIN_HOST, ConfigError, ServerConfig, tenants_dir
from ktransformers.server.connections import BoundedProtocol
from ktransformers.server.generation import Generator
from ktransformers.server.metrics import Metrics
from ktransformers.server.model import model_card
from ktransformers.server.public_prefixes import PublicPrefixes
from ktransformers.server.routing import Service
from ktransformers.server.tenants.directory import Directory
from ktransformers.server.tenants.ledger import Ledger
from ktransformers.server.tenants.limits import Limiter
from ktransformers.server.tenants.records import StoreError
from ktransformers.server.text.model import TextModel

EXIT_OK, EXIT_CONFIG, EXIT_INTERNAL, EXIT_DRAIN_TIMEOUT = 0, 1, 70, 75
CLOSING_SECONDS = 3
"""What a cut-off stream's last event may take to reach its client."""
ADMIN_POLL_SECONDS = 1.0

log = logging.getLogger("ktransformers.server")


class Server(uvicorn.Server):
    """uvicorn whose first SIGTERM or SIGINT drains: it keeps listening, so that readiness can be asked for. A
    second one ends at once."""

    def __init__(self, config: uvicorn.Config, generator: Generator, drain_timeout: float) -> None:
        super().__init__(config)
        self.exit_code = EXIT_OK
        self._generator, self._drain_timeout = generator, drain_timeout
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: object) -> None:
        """Called by uvicorn for each signal, between two instructions of the event loop's thread."""
        if self._draining is not None:
            self.should_exit = self.force_exit = True
            self.exit_code = EXIT_DRAIN_TIMEOUT
            return
        loop = asyncio.get_running_loop()
        self._draining = loop.create_task(self._drain())

    def fail(self) -> None:
        """End at once: the supervisor starts another."""
        self.exit_code = EXIT_INTERNAL
        self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        level = logging.INFO if self._generator.open_choices else logging.DEBUG
        log.log(level, "new requests are refused, running ones have %.0f s", self._drain_timeout)
        self._generator.drain()
        if not await self._generator.stop(self._drain_timeout):
            self.exit_code = EXIT_DRAIN_TIMEOUT
        self.should_exit = True


class AdminServer(uvicorn.Server):
    """The admin API's listener. Signals are the other server's business."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them as they are."""
        yield


async def serve(config: ServerConfig) -> int:
    """Serve until a signal; the exit code."""
    asyncio.get_running_loop().set_exception_handler(log_loop_error)
    try:
        directory = Directory.open(tenants_dir())
        used_today = await directory.read(lambda store: store.usage.on_day(int(time.time())))
    except StoreError as error:
        raise ConfigError(str(error)) from None
    try:
        return await _serve(config, directory, Limiter(used_today))
    finally:
        directory.close()


async def _serve(config: ServerConfig, directory: Directory, limiter: Limiter) -> int:
    keys = Keys.load(config, directory)
    listener = _listen("port", config.host, config.port)
    admin_listener = _listen_for_admin(config) if directory.view.has_admin else None
    path = Path(config.scheduler.engine.model)
    text = _load(path)
    card = model_card(path, config.model_name, text)
    scheduler = SchedulerClient.connect(config.scheduler.socket)
    metrics = Metrics(card.name, lambda: scheduler.status)
    ledger = Ledger(lambda at, rows, used: directory.post(lambda store: store.usage.add(at, rows, used)))
    generator = Generator(card.name, text, scheduler, metrics, config.request_timeout, limiter, ledger)
    service = Service(config, keys, metrics, generator, card, directory)
    server = Server(_uvicorn(make_app(service)), generator, config.drain_timeout)
    scheduler.start(server.fail)
    admin = asyncio.create_task(_serve_admin(service, admin_listener))
    public = asyncio.create_task(PublicPrefixes(generator, directory).run())
    # What was made until now stays for good: a collection that looks at all of it would hold everybody up.
    gc.collect()
    gc.freeze()
    try:
        await server.serve([listener])
    finally:
        for task in (admin, public):
            task.cancel()
        await asyncio.gather(admin, public, return_exceptions=True)
        await scheduler.close()
        await ledger.close()
        text.close()
    return server.exit_code


async def _serve_admin(service: Service, listener: socket.socket | None) -> None:
    """Serve the admin API, as soon as there is a key that opens it."""
    config, said = service.config, ""
    while listener is None:
        await asyncio.sleep(ADMIN_POLL_SECONDS)
        if service.directory.view.has_admin:
            try:
                listener = _listen_for_admin(config)
            except ConfigError as error:
                if str(error) != said:
                    said = str(error)
                    log.error("no admin API until it can: %s", said)
    log.info("admin API on %s port %d", *listener.getsockname()[:2])
    app = make_admin_app(replace(service, keys=AdminKeys(service.directory)))
    await AdminServer(_uvicorn(app)).serve([listener])


def _uvicorn(app: FastAPI) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=CLOSING_SECONDS,
        timeout_keep_alive=65,
    )


def _listen_for_admin(config: ServerConfig) -> socket.socket:
    return _listen("admin_port", ADMIN_HOST, config.admin_port)


def _listen(setting: str, host: str, port: int) -> socket.socket:
    """Raises ConfigError. Bound here and not by uvicorn, so that a port in use is one line and known at
    once.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        if error.errno == errno.EADDRINUSE:
            why += f"; stop what listens there, or take another --{setting.replace('_', '-')}"
        raise ConfigError(f"setting '{setting}': cannot listen on {host} port {port}: {why}") from None
    listener.setblocking(False)
    log.debug("listening on %s port %d", *listener.getsockname()[:2])
    return listener


def _load(path: Path) -> TextModel:
    """Raises ConfigError. Before the first request, and in this thread: there is nobody to keep waiting
    yet.
    """
    try:
        return TextModel.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # GgufError names the file; VocabularyError and TemplateError a key in it
        what = str(error)
        raise ConfigError(what if what.startswith(str(path)) else f"{path}: {what}") from None


def main() -> int:
    """Exit codes: 0 clean, 1 configuration, 70 internal, 75 requests were cut off by the drain timeout."""
    if len(sys.argv) != 2:
        print("usage: python -m ktransformers.server CONFIG.json", file=sys.stderr)
        return EXIT_CONFIG
    die_with_parent()
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(files, min(most, 65536)), most))
    try:
        config = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=ServerConfig)
    except (OSError, msgspec.MsgspecError) as error:
        print(f"ktransformers.server: {sys.argv[1]}: {error}", file=sys.stderr)
        return EXIT_CONFIG
    listener = start_logging("api", config.log_level)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(config))
    except ConfigError as error:
        print(f"ktransformers.server: {error}", file=sys.stderr)
        return EXIT_CONFIG
    finally:
        listener.stop()


if __name__ == "__main__":
    sys.exit(main())
