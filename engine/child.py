"""What every child of the supervisor does first."""

import ctypes
import os
import signal

SUPERVISOR_VARIABLE = "KT_SUPERVISOR"
"""Environment variable: the process id of the supervisor."""
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """The supervisor's death is ours from now on: nobody else would restart what we depend on."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    expected = os.environ.get(SUPERVISOR_VARIABLE)
    if expected is not None and expected != str(os.getppid()):
        os._exit(1)  # it died before we could ask for the signal
