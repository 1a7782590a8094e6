"""Conversations as chat templates read them: checked, reduced to text, and guarded against control tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from ktransformers.server.text.special_tokens import SpecialTokens, unused_mark
from ktransformers.server.text.tokenizer import without_surrogates

ROLES: Final = frozenset({"system", "user", "assistant", "tool"})
ARGUMENTS: Final[Mapping[str, type]] = {
    "enable_thinking": bool,
    "thinking": bool,
    "preserve_thinking": bool,
    "reasoning_effort": str,
}
"""What a client may set for a template beside the conversation (`chat_template_kwargs`)."""
SWITCHES: Final = ("enable_thinking", "thinking")
"""By which templates are told whether to think: Qwen's and GLM's name, DeepSeek's."""
LEVELS: Final = "reasoning_effort"
"""By which they are told how much: gpt-oss's name."""
_FIELDS: Final = frozenset(
    {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"}
)
# Words by which templates find their way through messages and tools: a mark inside one would change what they
# do. A template that frames one ("<|" + role + "|>") means the control token that comes of it.
_STRUCTURE: Final = frozenset(
    {
        *ROLES,
        *(
            "role",
            "content",
            "type",
            "text",
            "function",
            "tool_calls",
            "tool_call_id",
            "id",
            "reasoning_content",
        ),
        *(
            "thinking",
            "name",
            "description",
            "parameters",
            "arguments",
            "properties",
            "required",
            "items",
            "enum",
        ),
        *("object", "string", "integer", "number", "boolean", "array", "null", "default", "format", "strict"),
        *("anyOf", "oneOf", "allOf", "additionalProperties", "minimum", "maximum", "return"),
    }
)


class MessageError(ValueError):
    """A message is not what a chat can hold. The text names it and may be shown to the client."""


class ArgumentError(MessageError):
    """Something of the client's `chat_template_kwargs`."""


class ThinkingError(MessageError):
    """The model cannot be told to think so."""


def template_messages(messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Messages in the form that templates are written for. Raises MessageError.

    `content` is a string, a list of parts {"type": "text", "text": ...} (joined by newlines), or null. The
    role "developer" is today's name for "system". The arguments of tool calls, JSON text in OpenAI's API,
    become objects.
    """
    if not messages:
        raise MessageError("messages: must not be empty")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> dict[str, object]:
    if not isinstance(message, Mapping):
        raise MessageError(f"{where}: must be an object")
    if unknown := sorted(message.keys() - _FIELDS):
        raise MessageError(f"{where}.{unknown[0]:.40}: not supported")
    role = message.get("role")
    role = "system" if role == "developer" else role
    if not isinstance(role, str) or role not in ROLES:
        raise MessageError(f"{where}.role: must be one of system, developer, user, assistant, tool")
    calls = message.get("tool_calls")
    out: dict[str, object] = {"role": role, "content": _content(message.get("content"), f"{where}.content")}
    if message.get("content") is None and (role != "assistant" or not calls):
        raise MessageError(f"{where}.content: missing")
    for field in ("name", "tool_call_id"):
        if (value := message.get(field)) is not None:
            out[field] = _string(value, f"{where}.{field}")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if reasoning:
        # The second name is what the templates of gpt-oss read.
        out["reasoning_content"] = out["thinking"] = _string(reasoning, f"{where}.reasoning_content")
    if calls:
        if role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str):
            raise MessageError(f"{where}.tool_calls: must be a list, in a message of the assistant")
        out["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return out


def _content(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise MessageError(f"{where}: must be a string or a list of parts")
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else None
            raise MessageError(
                f"{where}[{i}].type: {str(kind)!r:.40} is not supported, this model reads text only"
            )
        texts.append(_string(part.get("text"), f"{where}[{i}].text"))
    return "\n".join(texts)


def _tool_call(call: object, where: str) -> dict[str, object]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise MessageError(f"{where}.function: missing")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.DecodeError, RecursionError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise MessageError(f"{where}.function.arguments: not a JSON object")
    name = _string(function.get("name"), f"{where}.function.name")
    out: dict[str, object] = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    if (call_id := call.get("id")) is not None:
        out["id"] = _string(call_id, f"{where}.id")
    return out


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise MessageError(f"{where}: must be a string")
    return value


def thinking_arguments(think: bool | str, variables: frozenset[str], thinks: bool) -> dict[str, object]:
    """How a template that reads these variables is told whether to think, or how much ("low", "medium",
    "high"). `thinks`: the model has markers of reasoning. Raises ThinkingError when it cannot be told."""
    if not think and not thinks:
        return {}  # it is so
    if isinstance(think, str):
        if LEVELS in variables:
            return {LEVELS: think}
        raise ThinkingError("this model's chat template knows no levels of thinking")
    for name in SWITCHES:
        if name in variables:
            return {name: think}
    if LEVELS in variables:
        if think:
            return {}  # a model with levels always does
        raise ThinkingError("this model always thinks; say 'low', 'medium' or 'high'")
    if not thinks:
        raise ThinkingError("this model does not think")
    raise ThinkingError("this model's chat template has no switch for thinking; leave it to the model")


def template_arguments(arguments: Mapping[str, object]) -> dict[str, object]:
    """Check a client's `chat_template_kwargs`. Raises ArgumentError."""
    for name, value in arguments.items():
        kind = ARGUMENTS.get(name)
        if kind is None:
            known = ", ".join(ARGUMENTS)
            raise ArgumentError(f"chat_template_kwargs.{name:.40}: not supported ({known} are)")
        if type(value) is not kind or (isinstance(value, str) and len(value) > 16):
            raise ArgumentError(
                f"chat_template_kwargs.{name}: must be a {'bool' if kind is bool else 'short string'}"
            )
    return dict(arguments)


def guard(value: object, special: SpecialTokens, template: str) -> tuple[object, str]:
    """A copy of `value` (JSON) with every string of a client guarded, keys too, and the mark that was used.

    See special_tokens.py. Lone surrogates become U+FFFD. Raises MessageError.
    """

    def guarded(text: str) -> str:
        return text if text in _STRUCTURE and special.id_of(text) is None else special.guard(text, mark)

    try:
        clean = _map_strings(value, without_surrogates)
        mark = unused_mark([template, *strings(clean)])
        return _map_strings(clean, guarded), mark
    except RecursionError:
        raise MessageError("messages: nested too deeply") from None
    except ValueError as e:
        raise MessageError(f"messages: {e}") from None


def _map_strings(value: object, change: Callable[[str], str]) -> object:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(item, change) for item in value]
    return value


def strings(value: object) -> Iterator[str]:
    """Every string in a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings(item)
