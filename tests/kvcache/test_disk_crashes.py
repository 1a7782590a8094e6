"""K2 and K3: killed at any time and between any two system calls, and X20: any of them fails.

See crashes.py, which also runs by itself for more. The bound of each is: no wrong byte, no exception, a
folder that can be opened and used.
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).parent / "crashes.py"


def run(*args: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, DRIVER, *map(str, args)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def test_a_thousand_kills(in_memory) -> None:
    """Every block that is found has its bytes, and the last one whose put returned is found."""
    said = run("kills", in_memory, 1000, random.randrange(1 << 30))
    print(said)
    assert said["kills"] == 1000 and said["empty"] == 0
    # The writer got somewhere in between, and there was something to be checked each time.
    assert said["puts"] > 5000 and said["checked"] > 10_000


def test_cut_off_at_every_system_call(in_memory) -> None:
    said = run("points", in_memory)
    print(said)
    assert said["calls"] > 200 and said["status 9"] == 2 * said["calls"] + said["half pwritev"]
    for call in ("pwritev", "sql", "fdatasync", "ftruncate", "rename", "unlink", "posix_fallocate"):
        assert said[f"before {call}"] == said[f"after {call}"] > 0


@pytest.mark.parametrize(
    "number", ["EIO", "ENOSPC", *(pytest.param(n, marks=pytest.mark.slow) for n in ("EROFS", "EMFILE"))]
)
def test_every_system_call_fails_once(in_memory, number) -> None:
    """Nothing is raised but by open (StoreError: 7), and what is left is as good as after a crash."""
    said = run("errors", in_memory, number)
    print(said)
    assert said["status 0"] + said["status 7"] == said["calls"]
    assert said["status 0"] > said["status 7"] > 0
