"""What every child of the supervisor does first."""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

SUPERVISOR_VARIABLE = "KT_SUPERVISOR"
"""Environment variable: the process id of the supervisor."""
_PR_SET_PDEATHSIG = 1
T = TypeVar("T")


def die_with_parent() -> None:
    """The supervisor's death is ours from now on: nobody else would restart what we depend on."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    expected = os.environ.get(SUPERVISOR_VARIABLE)
    if expected is not None and expected != str(os.getppid()):
        os._exit(1)  # it died before we could ask for the signal


def read_configuration(role: str, arguments: Sequence[str], kind: type[T]) -> T | None:
    """What is in the file that the one argument names; None, and a line on stderr, when it cannot be used."""
    if len(arguments) != 1:
        print(f"usage: python -m ktransformers.{role} CONFIG.json", file=sys.stderr)
        return None
    try:
        return msgspec.json.decode(Path(arguments[0]).read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError) as error:
        print(f"{role}: {arguments[0]}: {error}", file=sys.stderr)
        return None
