"""Bad input on the real server: the right refusal, and the next request is answered as before."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

GOLDEN = {"model": "default", "prompt": "One, two, three,", "max_tokens": 8, "temperature": 0, "seed": 1}
NUMBERS = {
    "temperature": (-0.001, 2.001),
    "top_p": (0, 1.001),
    "min_p": (-0.001, 1.001),
    "presence_penalty": (-2.001, 2.001),
    "frequency_penalty": (-2.001, 2.001),
    "repetition_penalty": (0, 2.001),
    "top_k": (-2, 49153),
    "n": (0, 9),
    "max_tokens": (0, 8193),
    "min_tokens": (-1, 8193),
    "seed": (-(2**63) - 1, 2**63),
    "logprobs": (-1, 21),
}
NEVER_A_NUMBER = ["NaN", "Infinity", "-Infinity", "1e309", '"1"', "true", "[]", "{}", "[1]", str(10**400)]
OTHERS = {
    "stop": ['""', '["x", 1]', json.dumps(["x"] * 17), json.dumps("x" * 129)],
    "stop_token_ids": ["[-1]", "[49152]", json.dumps([1] * 301)],
    "logit_bias": ['{"-1": 1}', '{"49152": 1}', '{"1": 101}', '{"1": NaN}'],
    "prompt": ["[-1]", "[49152]", "[[]]", "[]", "null", "{}", json.dumps(["x"] * 17), "[1.5]"],
    "no_such_parameter": ["1"],
    "stream": ['"yes"', "1"],
}


def bodies() -> list[tuple[str, str]]:
    found = [(name, json.dumps(value)) for name, values in NUMBERS.items() for value in values]
    found += [(name, raw) for name in NUMBERS for raw in NEVER_A_NUMBER]
    found += [(name, raw) for name, raws in OTHERS.items() for raw in raws]
    return found


def with_raw(name: str, raw: str) -> str:
    body = {k: v for k, v in GOLDEN.items() if k != name}
    return json.dumps(body)[:-1] + f', "{name}": {raw}}}'


def golden(url: str) -> str:
    reply = httpx.post(f"{url}/v1/completions", json=GOLDEN, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def test_every_parameter_beyond_its_bounds(server) -> None:
    before = golden(server.url)
    with httpx.Client(timeout=60) as http:
        for name, raw in bodies():
            reply = http.post(
                f"{server.url}/v1/completions",
                content=with_raw(name, raw),
                headers={"content-type": "application/json"},
            )
            assert 400 <= reply.status_code < 500, (name, raw[:60], reply.status_code, reply.text[:200])
            error = reply.json()["error"]
            assert isinstance(error["code"], str) and error["message"], (name, raw[:60], error)
    assert golden(server.url) == before


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"x"', 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b'{"model": "default", "prompt": "' + b"a" * (17 << 20) + b'"}', 413),
        (b'{"model": "default", "max_tokens": 4, "prompt": "' + b"word " * (3 << 20) + b'"}', 400),
    ],
    ids=["empty", "cut", "list", "null", "string", "not text", "deep", "17 MiB", "15 MiB of prompt"],
)
def test_bodies(server, body: bytes, status: int) -> None:
    reply = httpx.post(
        f"{server.url}/v1/completions",
        content=body,
        headers={"content-type": "application/json"},
        timeout=120,
    )
    assert reply.status_code == status, reply.text[:300]
    assert reply.json()["error"]["message"]
    golden(server.url)


def test_a_prompt_longer_than_the_context(server) -> None:
    reply = httpx.post(f"{server.url}/v1/completions", json=GOLDEN | {"prompt": [5] * 8193}, timeout=60)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    golden(server.url)


def test_model_files_that_cannot_be_served(tmp_path: Path, default_model: Path) -> None:
    """A start with a broken file ends with code 1 and one line that names the file.

    (The thousand shapes are in engine/test_gguf_hostile.)
    """
    whole = default_model.read_bytes()
    rng = random.Random(5)
    mangled = bytearray(whole[: 3 << 20])
    for _ in range(200):
        mangled[rng.randrange(len(mangled))] ^= 1 << rng.randrange(8)
    shapes = {
        "missing": None,
        "empty": b"",
        "text": b"hello\n" * 100,
        "magic only": whole[:4],
        "cut header": whole[:1000],
        "cut tensors": whole[: len(whole) // 2],
        "mangled": bytes(mangled),
        "huge counts": whole[:8] + b"\xff" * 16 + whole[24:4096],
        "version 99": whole[:4] + (99).to_bytes(4, "little") + whole[8:4096],
    }
    for name, content in shapes.items():
        path = tmp_path / f"{name}.gguf"
        if content is not None:
            path.write_bytes(content)
        run = subprocess.run(
            [sys.executable, "-m", "ktransformers.server.cli", "serve", str(path), "--port", "0"],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env=os.environ | {"XDG_STATE_HOME": str(tmp_path)},
        )
        assert run.returncode == 1, (name, run.returncode, run.stderr[-500:])
        lines = [line for line in run.stderr.splitlines() if line.strip()]
        assert "Traceback" not in run.stderr and len(lines) <= 3, (name, run.stderr[-1000:])
        assert path.name in run.stderr.replace("\n", ""), (name, run.stderr)
