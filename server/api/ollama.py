"""Ollama's protocol: chat, generate, and what its clients ask about models."""

from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ktransformers.server.accounting import Usage
from ktransformers.server.api import logprobs
from ktransformers.server.api.encoding import encode
from ktransformers.server.api.ollama_requests import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaRequest,
    ShowRequest,
)
from ktransformers.server.auth import Role, requires
from ktransformers.server.deltas import Generation, TokenLogprob
from ktransformers.server.errors import RESPONSES, RequestError
from ktransformers.server.generation import QUEUE_PATIENCE, Generator
from ktransformers.server.routing import Context, GuardedRoute, context_of
from ktransformers.server.streaming import ByteStream, while_connected, with_error_event
from ktransformers.server.tenants.records import REQUEST

router = APIRouter(route_class=GuardedRoute, tags=["ollama"], responses=RESPONSES)
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"application/x-ndjson": {}}}}
_FOREVER = "2318-04-11T12:00:00Z"
"""As Ollama says of a model that is kept loaded: in some three hundred years."""


def _json(value: Any) -> Response:
    return Response(encode(value), media_type="application/json")


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


# ---- chat and generate


@router.post("/api/chat", operation_id="ollama_chat", responses=_STREAMED)
@requires(Role.USER, REQUEST)
async def chat(body: OllamaChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    context = context_of(request)
    generator = context.generator
    generator.admit(body.model, context.caller)
    if not body.messages:
        return _loaded(body, generator, {"message": {"role": "assistant", "content": ""}})
    messages = [message.for_template() for message in body.messages]
    return await _answer(
        body,
        request,
        context,
        lambda: generator.chat_prompt(messages, body.think),
        b'"message":{"role":"assistant","content":',
        b"}",
        lambda text, thought: {"message": {"role": "assistant", "content": text} | _thinking(thought)},
    )


@router.post("/api/generate", operation_id="ollama_generate", responses=_STREAMED)
@requires(Role.USER, REQUEST)
async def generate(body: OllamaGenerateRequest, request: Request) -> Response:
    """Continue a prompt, put into the model's template unless `raw`."""
    context = context_of(request)
    generator = context.generator
    generator.admit(body.model, context.caller)
    if not body.prompt:
        return _loaded(body, generator, {"response": ""})
    prompt = body.prompt
    if body.raw and body.system:
        raise RequestError("invalid_value", "'system' needs a template, which 'raw' leaves out", "system")
    if body.raw and body.think is not None and (body.think or generator.text.markers.thinks):
        raise RequestError("invalid_value", "'think' needs a template, which 'raw' leaves out", "think")
    messages = [{"role": "system", "content": body.system}] if body.system else []
    messages.append({"role": "user", "content": prompt})
    return await _answer(
        body,
        request,
        context,
        lambda: generator.text_prompt(prompt) if body.raw else generator.chat_prompt(messages, body.think),
        b'"response":',
        b"",
        lambda text, thought: {"response": text} | _thinking(thought),
        continues=bool(body.raw),
    )


def _loaded(body: OllamaRequest, generator: Generator, answer: dict[str, Any]) -> Response:
    """An empty request asks that the model be loaded, which it is, or unloaded, which it stays."""
    if body.keep_alive in (0, "0", "0s"):
        raise RequestError(
            "unsupported_parameter", "'keep_alive' 0: this server's model is not unloaded", "keep_alive"
        )
    generator.context()
    return _json({"model": body.model, "created_at": _now(), **answer, "done": True, "done_reason": "load"})


async def _answer(
    body: OllamaRequest,
    request: Request,
    context: Context,
    prompt: Callable[[], Coroutine[Any, Any, list[int]]],
    before: bytes,
    after: bytes,
    answer: Callable[[str, str], dict[str, Any]],
    continues: bool = False,
) -> Response:
    """`before` and `after` enclose the JSON string of a piece of text in a chunk; `answer` is the whole of it
    and of the reasoning before it."""
    generator = context.generator
    streamed = body.stream is None or body.stream

    async def start() -> Generation:
        parameters = body.parameters(generator.context())
        patience = QUEUE_PATIENCE if streamed else None
        generation = await generator.start(
            [await prompt()], parameters, context.caller, continues, patience
        )
        context.headers.update(generation.headers)
        return generation

    if streamed:
        generation = await while_connected(request.receive, start())
        lines = _lines(generation, body.model, generator, before, after, answer)
        # An empty piece: lines know no comment.
        idle = encode({"model": body.model, "created_at": _now(), **answer("", ""), "done": False}) + b"\n"
        return ByteStream(with_error_event(lines, _error_line), "application/x-ndjson", idle)

    async def fold() -> dict[str, Any]:
        generation = await start()
        text: list[str] = []
        thought: list[str] = []
        found: list[TokenLogprob] = []
        reason = ""
        async with aclosing(generation) as deltas:
            async for delta in deltas:
                text.append(delta.text)
                thought.append(delta.reasoning)
                found.extend(delta.logprobs)
                reason = delta.finish
        whole = {"model": body.model, "created_at": _now(), **answer("".join(text), "".join(thought))}
        if body.logprobs:
            whole["logprobs"] = _logprobs(generator, found)
        return whole | _end(reason, generation.usage)

    return _json(await while_connected(request.receive, fold()))


async def _lines(
    generation: Generation,
    model: str,
    generator: Generator,
    before: bytes,
    after: bytes,
    answer: Callable[[str, str], dict[str, Any]],
) -> AsyncGenerator[bytes, None]:
    head = b'{"model":' + encode(model) + b',"created_at":"'
    middle, tail = b'",' + before, after + b',"done":false'
    reason = ""
    async with aclosing(generation) as deltas:
        async for delta in deltas:
            reason = delta.finish
            if delta.reasoning:
                thought = answer("", delta.reasoning)
                yield encode({"model": model, "created_at": _now(), **thought, "done": False}) + b"\n"
            if delta.text or delta.logprobs:
                found = (
                    b',"logprobs":' + encode(_logprobs(generator, delta.logprobs)) if delta.logprobs else b""
                )
                yield head + _now().encode() + middle + encode(delta.text) + tail + found + b"}\n"
    last = answer("", "") | _end(reason, generation.usage)
    yield encode({"model": model, "created_at": _now(), **last}) + b"\n"


def _thinking(thought: str) -> dict[str, str]:
    """The field that a model that thinks has in its answers."""
    return {"thinking": thought} if thought else {}


def _logprobs(generator: Generator, tokens: Sequence[TokenLogprob]) -> Any:
    return logprobs.chat(generator.text.tokenizer, tokens)["content"]


def _end(reason: str, usage: Usage) -> dict[str, Any]:
    """Durations are in nanoseconds. Loading is not part of a request here."""
    return {
        "done": True,
        "done_reason": reason,
        "total_duration": int((usage.last_token - usage.submitted) * 1e9),
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": int((usage.first_token - usage.submitted) * 1e9),
        "eval_count": usage.completion_tokens,
        "eval_duration": int((usage.last_token - usage.first_token) * 1e9),
    }


def _error_line(error: RequestError) -> bytes:
    return encode({"error": error.message}) + b"\n"


# ---- models


def _description(context: Context) -> dict[str, Any]:
    card = context.service.card
    return {
        "name": f"{card.name}:latest",
        "model": f"{card.name}:latest",
        "size": card.size,
        "digest": card.digest,
        "details": {
            "parent_model": "",
            "format": card.container,
            "family": card.family,
            "families": [card.family],
            "parameter_size": card.parameter_size,
            "quantization_level": card.quantization,
        },
    }


@router.head("/api/tags", include_in_schema=False)
@router.get("/api/tags", operation_id="ollama_tags")
@requires(Role.USER)
async def tags(request: Request) -> Response:
    """The one model there is, if the caller may use it."""
    context = context_of(request)
    if not context.caller.may_use(context.generator.model_name):
        return _json({"models": []})
    return _json({"models": [_description(context) | {"modified_at": context.service.card.modified_at}]})


@router.get("/api/ps", operation_id="ollama_ps")
@requires(Role.USER)
async def ps(request: Request) -> Response:
    """The model, if it is loaded. Nothing of it lies in GPU memory as far as this process knows."""
    context = context_of(request)
    status = context.generator.scheduler.status
    if status is None or not status.ready or not context.caller.may_use(context.generator.model_name):
        return _json({"models": []})
    return _json(
        {
            "models": [
                _description(context)
                | {"expires_at": _FOREVER, "size_vram": 0, "context_length": status.max_len}
            ]
        }
    )


@router.post("/api/show", operation_id="ollama_show")
@requires(Role.USER)
async def show(body: ShowRequest, request: Request) -> Response:
    """What is known about the model."""
    context = context_of(request)
    context.generator.check_model(body.model or body.name or "", context.caller)
    card = context.service.card
    return _json(
        {
            "license": card.license,
            "modelfile": "",
            "parameters": "",
            "template": card.template,
            "details": _description(context)["details"],
            "model_info": card.info,
            "capabilities": ["completion"],
            "modified_at": card.modified_at,
        }
    )


@router.head("/api/version", include_in_schema=False)
@router.get("/api/version", operation_id="ollama_version")
@requires(Role.USER)
async def api_version() -> Response:
    """The version of this package."""
    return _json({"version": VERSION})


def _version() -> str:
    try:
        return version("ktransformers")
    except PackageNotFoundError:  # run from a checkout
        return "0.0.0"


VERSION = _version()
