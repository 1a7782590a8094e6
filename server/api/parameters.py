"""Bounds that hold at every API, and the base of its request models.

A field is honoured, or refused with an error that names it: one that the protocol does not know, and one that
it knows but this server does not do, unless its value is the one that asks for nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ktransformers.server.errors import RequestError

ONE, LIST, NUMBERS, LISTS, WORD = "<one>", "<list>", "<numbers>", "<lists>", "<word>"
"""Tags of what a field may hold instead of one value."""
_NOT_IN_PATHS = frozenset({"body", "[key]", ONE, LIST, NUMBERS, LISTS, WORD})
_NO_OBJECT = frozenset({"missing", "model_type", "model_attributes_type"})
"""Of pydantic's kinds of errors, what an empty body is and one that holds a list or a number."""
MAX_STOP_BYTES = 128
MAX_SALT_BYTES = 128
"""It is hashed for each request: an unbounded one is a way to keep a server busy."""
MAX_FIELDS = 128
"""Of one object; more than any model here has. One error is enough: pydantic would list them all."""


def _bounded_stop(stop: str) -> str:
    if not 0 < len(stop.encode()) <= MAX_STOP_BYTES:
        raise PydanticCustomError(
            "stop_length", "A stop string must have 1 to {max} bytes", {"max": MAX_STOP_BYTES}
        )
    return stop


def at_most(entries: int) -> BeforeValidator:
    """Refuse a larger object before its entries are looked at: pydantic counts them last, and lists what is
    wrong with each of a million.
    """

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > entries:
            raise PydanticCustomError("too_long", "Must have at most {max} entries", {"max": entries})
        return value

    return BeforeValidator(check)


def _bounded_bytes(text: str) -> str:
    if len(text.encode()) > 512:
        raise PydanticCustomError("too_long", "Must have at most 512 bytes")
    return text


ONE_OR_LIST = Discriminator(lambda value: LIST if isinstance(value, list) else ONE)
"""A value or a list of such: which is meant is seen from outside, so that an error is about that."""
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
MinP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
RepetitionPenalty = Annotated[float, Field(ge=1e-3, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)]
Choices = Annotated[int, Field(ge=1, le=8)]
TokenCount = Annotated[int, Field(ge=1, le=1 << 24)]
Logprobs = Annotated[int, Field(ge=0, le=20)]
TokenId = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
StopString = Annotated[str, AfterValidator(_bounded_stop)]
StopStrings = Annotated[list[StopString], Field(fail_fast=True, max_length=16)]
Stop = Annotated[Annotated[StopString, Tag(ONE)] | Annotated[StopStrings, Tag(LIST)], ONE_OR_LIST]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, max_length=300)]
Label = Annotated[str, AfterValidator(_bounded_bytes)]


def _bounded_salt(salt: str) -> str:
    if not 0 < len(salt.encode()) <= MAX_SALT_BYTES:
        raise PydanticCustomError(
            "salt_length", "A cache_salt must have 1 to {max} bytes", {"max": MAX_SALT_BYTES}
        )
    return salt


CacheSalt = Annotated[str, AfterValidator(_bounded_salt)]


class StrictModel(BaseModel):
    """No conversion between types, no unknown field; `neutral` are known fields with the values that ask for
    nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_done(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MAX_FIELDS:
            raise PydanticCustomError("too_long", "Must have at most {max} fields", {"max": MAX_FIELDS})
        for name in cls.neutral.keys() & data.keys():
            if not any(
                data[name] is value or (data[name] == value and type(data[name]) is type(value))
                for value in cls.neutral[name]
            ):
                raise PydanticCustomError("unsupported", "is not supported with this value", {"param": name})
        return {name: value for name, value in data.items() if name not in cls.neutral}


def to_seed(seed: int) -> int:
    """A client's 64-bit seed as the non-negative one of the engine; different seeds >= 0 stay different."""
    return seed & ((1 << 63) - 1)


def validation_error(errors: Sequence[Mapping[str, Any]]) -> RequestError:
    """What pydantic found, as an error that names the first field at fault. Never shows the value."""
    if not errors:
        return RequestError("invalid_request", "the request is not valid")
    first = errors[0]
    kind, where = first["type"], [part for part in first["loc"] if part not in _NOT_IN_PATHS]
    if kind == "unsupported":
        where.append(first["ctx"]["param"])
    param = str(where[0])[:64] if where else None
    path = ".".join(str(part) for part in where)[:120]
    if kind == "extra_forbidden":
        return RequestError("unknown_parameter", f"unknown parameter '{path}'", param)
    if kind == "unsupported":
        return RequestError("unsupported_parameter", f"'{path}' {first['msg']}", param)
    if param is None:
        what = "has to be a JSON object" if kind in _NO_OBJECT else f"is refused: {first['msg']}"
        return RequestError("invalid_request", f"the body {what}")
    return RequestError("invalid_value", f"'{path}': {first['msg']}", param)
