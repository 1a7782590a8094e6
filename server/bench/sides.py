"""Who is compared: other engines on the same file, each asked for the rate of one load at a time."""

import json
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from ktransformers.server.bench.processes import signal_tree

TIMEOUT_SECONDS = 900


class SideError(Exception):
    """An engine that cannot be measured; in one line."""


class Side(Protocol):
    """One engine with one model."""

    name: str

    def rate(self, load: Mapping[str, Any], seconds: float) -> float | None:
        """Tokens per second of a load (the fields of engine.bench.loads.Load), measured for about `seconds`.

        0 seconds is to warm up. None: it has no such load. Errors: SideError.
        """

    def close(self) -> None:
        """Free what it holds."""


class WorkerSide:
    """A process that says what it is in a line of JSON, and then answers each line with another.

    It gets the fields of a load and `seconds`, and answers {"rate": tokens per second, or null}. Between
    questions it stands still: threads that wait for work may spin, on CPUs that others are measured on.
    """

    def __init__(self, command: Sequence[str]) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd="/")
        self.pid = self._process.pid
        about = self._read()
        signal_tree(self.pid, signal.SIGSTOP)
        self.name = str(about["engine"])
        self.about = about

    def rate(self, load: Mapping[str, Any], seconds: float) -> float | None:
        rate = self._ask({**load, "seconds": seconds})["rate"]
        return None if rate is None else float(rate)

    def close(self) -> None:
        signal_tree(self.pid, signal.SIGCONT)
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        signal_tree(self.pid, signal.SIGCONT)
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
        except OSError:
            raise SideError(f"a worker died with code {self._process.wait()}") from None
        answer = self._read()
        signal_tree(self.pid, signal.SIGSTOP)
        return answer

    def _read(self) -> dict[str, Any]:
        for line in self._process.stdout or ():
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SideError(f"a worker died with code {self._process.wait()}")


class LlamaBench:
    """A llama-bench program (of llama.cpp or a fork), with llama-batched-bench beside it if there is one.

    It loads the model for each figure. `options` go to both, such as the fork's `-rtr 1`.
    """

    def __init__(self, program: Path, model: Path, threads: int, options: Sequence[str] = ()) -> None:
        self._program, self._model = program.absolute(), model.absolute()
        self._threads, self._options = threads, list(options)
        self._batched = self._program.with_name("llama-batched-bench")
        said = _run([str(self._program), "--help"])
        self._depth = next((option for option in ("--n-depth", "-gp") if option in said), None)
        self.name = " ".join([program.name, *options])

    def rate(self, load: Mapping[str, Any], seconds: float) -> float | None:
        if seconds == 0.0:
            return None  # it warms up by itself, each time
        if load["kind"] == "decode" and load["streams"] > 1:
            return self._batch(load) if self._batched.exists() else None
        base = [str(self._program), "-m", str(self._model), "-t", str(self._threads), "-r", "2", "-o", "json"]
        if load["kind"] == "prefill":
            what = ["-p", str(load["tokens"]), "-n", "0"]
        else:
            deep = str(load["context"])
            match self._depth:
                case "--n-depth":
                    what = ["-p", "0", "-n", "64", "-d", deep]
                case "-gp":  # of ik_llama.cpp: as many tokens after a prompt that is not timed
                    what = ["-p", "0", "-n", "0", "-gp", f"{deep},64"]
                case _:
                    return None
        output = _run([*base, *what, *self._options])
        results, _ = json.JSONDecoder().raw_decode(output, output.index("[\n"))
        return float(max(results[-1]["samples_ts"]))  # the first is cold: it warms up with one token

    def close(self) -> None:
        """Nothing stays between figures."""

    def _batch(self, load: Mapping[str, Any]) -> float:
        """Of the table that llama-batched-bench prints, the generated tokens per second."""
        context = load["streams"] * (load["context"] + 64)
        command = [str(self._batched), "-m", str(self._model), "-t", str(self._threads), "-c", str(context)]
        command += ["-npp", str(load["context"]), "-ntg", "32", "-npl", str(load["streams"]), *self._options]
        rows = [line.split("|") for line in _run(command).splitlines() if line.startswith("|")]
        if len(rows) < 2:
            raise SideError(f"{self._batched.name} has printed no table")
        head = [cell.strip() for cell in rows[0]]
        return float(rows[-1][head.index("S_TG t/s")])


def _run(command: Sequence[str]) -> str:
    try:
        with TemporaryDirectory() as folder:  # some write a log into the folder that they are called in
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, cwd=folder
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SideError(str(error)) from None
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise SideError(f"{command[0]} ended with {done.returncode}: {' '.join(last)}")
    # llama.cpp writes its table to stdout, older forks write it to stderr.
    return done.stdout + done.stderr
