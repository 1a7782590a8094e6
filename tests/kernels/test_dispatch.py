"""Which tables a process may use: KT_MAX_ISA is read once, so each case is a process of its own."""

import os
import subprocess
import sys

import pytest

from ktransformers.engine import _kernels

ORDER = ["amx", "avx512_bf16", "avx512", "avxvnni", "avx2", "reference"]


def isas(cap: str, ask: str = "isas") -> subprocess.CompletedProcess[str]:
    code = f"from ktransformers.engine import _kernels; print(*_kernels.{ask}())"
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


@pytest.mark.parametrize("cap", ["avx1024", "amx_emulated", "avxvnni_emulated"])
def test_an_unknown_cap_is_refused_by_name(cap):
    done = isas(cap)
    assert done.returncode != 0
    assert f"ValueError: KT_MAX_ISA={cap}: not one of {', '.join(ORDER)}" in done.stderr


def test_emulated_tables_need_what_they_are_built_on():
    """They are there for tests, but a cap means what it says."""
    bases = {"amx_emulated": "avx512_bf16", "avxvnni_emulated": "avx2"}
    usable = _kernels.isas()
    assert _kernels.emulated_isas() == [name for name, base in bases.items() if base in usable]
    assert isas("avx2", "emulated_isas").stdout.split() == [
        name for name, base in bases.items() if base == "avx2" and base in usable
    ]
    assert isas("reference", "emulated_isas").stdout.split() == []
