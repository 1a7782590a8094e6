"""The placement file: which ops go where, in TOML.

    memory_bytes = 20_000_000_000    # of the device; absent: what is free of it
    policy = "frequency"             # which experts are hot: uniform, frequency or adaptive
    defer = 0                        # experts of a token that are added one layer later: changes outputs

    [[rule]]
    match = "blk.*.attn_*"           # names of weights without ".weight", and blk.N.experts; * ? [0-9]
    format = "bf16"

    [[rule]]
    match = "blk.[0-3].experts"
    device = "device"                # or "cpu"
    experts = [0, 5, 9]              # absent: all of the op

For each thing that can be said (device, format of either side, kernel) the first rule that matches and says
it counts. What no rule places is placed by itself: see place.py.
"""

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Final, Literal, get_args

import msgspec
from msgspec import Meta

from ktransformers.engine.models.spec import ModelError

Policy = Literal["uniform", "frequency", "adaptive"]
Device = Literal["device", "cpu"]
DeviceFormat = Literal["f32", "bf16"]
CpuFormat = Literal["as-is", "int8", "int4"]

DEVICE_FORMATS: Final[tuple[str, ...]] = get_args(DeviceFormat)
CPU_FORMATS: Final[tuple[str, ...]] = get_args(CpuFormat)
DEVICE_KERNEL: Final = "torch"
AUTO: Final = "auto"
_LARGEST_FILE: Final = 1 << 20


class PlacementError(ModelError):
    """A placement that cannot be used; the message names the file, the rule and what to do."""


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one [[rule]] says of the ops that its pattern matches."""

    match: Annotated[str, Meta(min_length=1)]
    device: str | None = None
    format: str | None = None
    kernel: str | None = None
    experts: tuple[Annotated[int, Meta(ge=0)], ...] | None = None

    def matches(self, name: str) -> bool:
        """Whether the pattern is one for this name."""
        return fnmatchcase(name, self.match)


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    memory_bytes: Annotated[int, Meta(ge=1, le=1 << 60)] | None = None
    policy: Policy = "frequency"
    defer: Annotated[int, Meta(ge=0, le=64)] = 0
    statistics: str | None = None
    rule: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Rules:
    """A placement file that has been read; "auto" is one without any line."""

    where: str
    """The file, for messages."""
    memory_bytes: int | None = None
    policy: Policy = "frequency"
    defer: int = 0
    statistics: Path | None = None
    """Where counts of chosen experts are kept; None: in the cache folder, by the model."""
    rules: tuple[Rule, ...] = ()

    def error(self, number: int, what: str) -> PlacementError:
        """An error in rule `number` (from 0)."""
        return PlacementError(f"{self.where}: rule {number + 1}: {what}")


def read_rules(placement: str, kernels: tuple[str, ...]) -> Rules:
    """The rules of the setting `placement`: "auto", or a file's path. `kernels`: tables that this CPU runs.

    PlacementError for a file that cannot be read, an unknown key, device, format or kernel.
    """
    if placement == AUTO:
        return Rules(where="placement auto")
    path = Path(placement)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise PlacementError(f"placement: {path}: larger than {_LARGEST_FILE} bytes")
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"{error.strerror}; name a TOML file, or '{AUTO}'"
        raise PlacementError(f"placement: {path}: {what}") from None
    except UnicodeDecodeError:
        raise PlacementError(f"placement: {path}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise PlacementError(f"placement: {path}: {error}") from None
    try:
        file = msgspec.convert(document, _File)
    except msgspec.ValidationError as error:
        raise PlacementError(f"placement: {path}: {_plain(str(error))}") from None
    rules = Rules(
        where=f"placement: {path}",
        memory_bytes=file.memory_bytes,
        policy=file.policy,
        defer=file.defer,
        statistics=None if file.statistics is None else path.parent / file.statistics,
        rules=file.rule,
    )
    for number, rule in enumerate(rules.rules):
        _check(rules, number, rule, kernels)
    return rules


def _plain(message: str) -> str:
    """msgspec's message with its path of the document as TOML has it: `$.rule[0]` is rule 1."""
    text = message.replace("Object contains unknown field", "unknown key")
    what, _, where = text.partition(" - at `$")
    if not where.startswith(".rule["):
        return what if not where else f"{where.removeprefix('.').rstrip('`')}: {what}"
    number, _, field = where.removeprefix(".rule[").rstrip("`").partition("]")
    return f"rule {int(number) + 1}: {field.removeprefix('.') + ': ' if field else ''}{what}"


def _check(rules: Rules, number: int, rule: Rule, kernels: tuple[str, ...]) -> None:
    """What can be wrong with a rule whatever the model is."""
    if rule.device is None and rule.format is None and rule.kernel is None:
        raise rules.error(number, "says neither device, format nor kernel")
    if rule.device not in (None, *get_args(Device)):
        raise rules.error(number, f"device {rule.device!r} is not known: 'device' (the executor's) or 'cpu'")
    formats = DEVICE_FORMATS + CPU_FORMATS
    if rule.device is not None:
        formats = DEVICE_FORMATS if rule.device == "device" else CPU_FORMATS
    if rule.format not in (None, *formats):
        on = f" on {rule.device!r}" if rule.device is not None else ""
        raise rules.error(number, f"format {rule.format!r} is not known{on}: {', '.join(formats)}")
    tables = (*kernels, DEVICE_KERNEL)
    if rule.device is not None:
        tables = (DEVICE_KERNEL,) if rule.device == "device" else kernels
    if rule.kernel not in (None, *tables):
        on = f" on {rule.device!r}" if rule.device is not None else " on this machine"
        raise rules.error(number, f"kernel {rule.kernel!r} is not known{on}: {', '.join(tables)}")
    if rule.experts is not None and (rule.format is not None or rule.kernel is not None):
        what = "all experts of an op on one side have one format and kernel: say it in a rule without experts"
        raise rules.error(number, what)
    if rule.experts is not None and not rule.experts:
        raise rules.error(number, "experts is empty")
