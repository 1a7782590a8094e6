"""Which tables a process may use: KT_MAX_ISA is read once, so each case is a process of its own."""

import os
import subprocess
import sys

import pytest

from ktransformers.engine import _kernels

ORDER = ["avx512_bf16", "avx512", "avx2", "reference"]


def isas(cap: str) -> subprocess.CompletedProcess[str]:
    code = "from ktransformers.engine import _kernels; print(*_kernels.isas())"
    environment = {**os.environ, "KT_MAX_ISA": cap}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_best_first_and_reference_last():
    usable = _kernels.isas()
    assert usable == [isa for isa in ORDER if isa in usable]
    assert usable[-1] == "reference"


@pytest.mark.parametrize("cap", ORDER)
def test_a_cap_leaves_it_and_what_is_below(cap):
    allowed = ORDER[ORDER.index(cap) :]
    usable = isas("").stdout.split()
    assert isas(cap).stdout.split() == [isa for isa in usable if isa in allowed]


def test_an_unknown_cap_is_refused_by_name():
    done = isas("avx1024")
    assert done.returncode != 0
    assert "ValueError: KT_MAX_ISA=avx1024: not one of avx512_bf16, avx512, avx2, reference" in done.stderr
