"""A line of the log: what is never in it."""

import asyncio
import json
import logging
import sys
from pathlib import Path

import pytest

from ktransformers.engine.logs import ForPeople, JsonLines, frames, log_loop_error

CANARY = "canary of a client"


def record(message: str, *args: object) -> logging.LogRecord:
    try:
        raise ValueError(CANARY)
    except ValueError:
        return logging.LogRecord("x", logging.ERROR, __file__, 1, message, args, sys.exc_info())


@pytest.mark.parametrize("formatter", [JsonLines(), ForPeople("engine")], ids=["json", "people"])
def test_an_exception_says_where_and_not_what(formatter: logging.Formatter) -> None:
    line = formatter.format(record("it failed\n"))
    assert "ValueError at record:" in line and CANARY not in line and "\n" not in line


@pytest.mark.parametrize("formatter", [JsonLines(), ForPeople("engine")], ids=["json", "people"])
def test_a_name_from_a_file_does_not_steer_the_terminal(formatter: logging.Formatter) -> None:
    line = formatter.format(record("model %s", "\x1b]0;pwned\x07\x1b[2J\x9b31m\r\n2026 server all is well"))
    assert not any(code in line for code in ("\x1b]", "\x1b[2J", "\x07", "\x9b", "\r"))
    assert "\n2026" not in line


def test_indented_tables_stay_tables() -> None:
    assert "\n      weights" in ForPeople("engine").format(record("too large:\n  weights"))
    assert json.loads(JsonLines().format(record("a\nb")))["message"] == "a\nb"


def test_what_nobody_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(log_loop_error)

        def broken(what: str) -> None:
            raise RuntimeError(what)

        loop.call_soon(broken, CANARY)
        await asyncio.sleep(0.01)

    asyncio.run(run())
    assert "RuntimeError at broken:" in caplog.text and CANARY not in caplog.text


def test_an_error_of_the_system_has_its_code_and_no_path(tmp_path: Path) -> None:
    try:
        (tmp_path / "secret").read_bytes()
    except OSError as error:
        said = frames(error)
    assert said.startswith("FileNotFoundError ENOENT at ") and "secret" not in said
