"""Prove that the object of one instruction set can harm nobody: `check_objects.py BUILD_FOLDER`.

An inline function compiled with AVX-512 and kept by the linker for the whole program, or a constructor that
runs before the dispatcher has looked at the processor, would be an illegal instruction on an older machine.
So each object may define its kernel table and nothing else that is visible, nothing weak, and no constructor.
Nor may an object for processors without AVX-512 hold an instruction of it; that of AVX-VNNI holds its own.
"""

import subprocess
import sys
from pathlib import Path

TABLES = {
    "reference": "kt::kReference",
    "avx2": "kt::kAvx2",
    "avxvnni": "kt::kAvxVnniProducts",
    "avxvnni_emulated": "kt::kEmulatedVnniProducts",
    "avx512": "kt::kAvx512",
    "avx512_bf16": "kt::kAvx512Bf16",
    "amx": "kt::kAmxTiles",
    "amx_emulated": "kt::kEmulatedTiles",
}
# What the compiler itself may call: libc's memory functions, libm's exact ones, libgcc's float16 conversions;
# and what cpu/isa.h knows of the processor.
MAY_NEED = {
    "_GLOBAL_OFFSET_TABLE_", "memcpy", "memmove", "memset", "fmaf", "rintf", "sqrtf",
    "__extendhfsf2", "__truncsfhf2", "kt::kRoomyFirstLevel",
}  # fmt: skip
# Tables that are built on another one; the emulated tiles are a thread's own.
AND_THESE = {
    "avxvnni": {"kt::kAvx2"},
    "avxvnni_emulated": {"kt::kAvx2"},
    "amx": {"kt::kAvx512Bf16"},
    "amx_emulated": {"kt::kAvx512Bf16", "__tls_get_addr"},
}

WITH_AVX512 = {"avx512", "avx512_bf16", "amx", "amx_emulated"}
EVEX = "62"  # the first byte of everything that AVX-512 adds


def wrong_instructions(path: Path, name: str) -> list[str]:
    """The same, of the machine code of table `name`: AVX-512 and AVX-VNNI only where they belong."""
    if name in WITH_AVX512:
        return []
    code = subprocess.check_output(["objdump", "-d", path], text=True)
    lines = [line.split("\t") for line in code.splitlines() if line.count("\t") == 2]
    found = {f"has {what[2].split()[0]} of AVX-512" for what in lines if what[1].startswith(EVEX)}
    has_dot = any("vpdpbusd" in what[2] for what in lines)
    if has_dot != (name == "avxvnni"):
        found.add("has vpdpbusd" if has_dot else "has no vpdpbusd")
    return sorted(found)


def faults(path: Path, table: str, may_need: set[str]) -> list[str]:
    """What is wrong with one object, one line each."""
    found = []
    defined = set()
    for line in subprocess.check_output(["nm", "-C", path], text=True).splitlines():
        kind, name = line[17:].split(" ", 1)
        if kind in "WwVvu":
            found.append(f"weak or unique symbol {name}")
        elif kind == "U":
            if name not in may_need:
                found.append(f"needs {name}")
        elif kind.isupper():
            defined.add(name)
    found += [f"defines {name}" for name in sorted(defined - {table})]
    if table not in defined:
        found.append(f"does not define {table}")
    sections = subprocess.check_output(["readelf", "-SW", path], text=True)
    found += [f"has a constructor ({name})" for name in (".init_array", ".ctors") if name in sections]
    return found


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__.splitlines()[0], file=sys.stderr)
        return 2
    failed = False
    for name, table in TABLES.items():
        objects = sorted(Path(sys.argv[1]).glob(f"**/isa_{name}.dir/kernels/{name}.cpp.o"))
        if not objects:
            print(f"{sys.argv[1]}: no object of {name}", file=sys.stderr)
            failed = True
        for path in objects:
            found = faults(path, table, MAY_NEED | AND_THESE.get(name, set()))
            for fault in found + wrong_instructions(path, name):
                print(f"{path}: {fault}", file=sys.stderr)
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
