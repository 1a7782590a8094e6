"""OpenAI's protocol: models, chat completions, legacy completions."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ktransformers.server import errors
from ktransformers.server.accounting import Usage
from ktransformers.server.api import logprobs
from ktransformers.server.api.encoding import encode
from ktransformers.server.api.openai_requests import ChatRequest, CompletionRequest
from ktransformers.server.auth import Role, requires
from ktransformers.server.deltas import Generation, TokenLogprob
from ktransformers.server.errors import RESPONSES, RequestError
from ktransformers.server.generation import QUEUE_PATIENCE
from ktransformers.server.routing import Context, GuardedRoute, context_of
from ktransformers.server.streaming import SSE_IDLE, ByteStream, while_connected, with_error_event
from ktransformers.server.tenants.records import REQUEST
from ktransformers.server.text.detokenizer import Pieces

router = APIRouter(route_class=GuardedRoute, tags=["openai"], responses=RESPONSES)
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_DONE = b"data: [DONE]\n\n"


def _json(value: Any) -> Response:
    return Response(encode(value), media_type="application/json")


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def _error_event(error: RequestError) -> bytes:
    return b"data: " + encode(errors.body("", error)) + b"\n\n"


# ---- models


def _model(context: Context) -> dict[str, Any]:
    status = context.generator.scheduler.status
    card = context.service.card
    return {
        "id": card.name,
        "object": "model",
        "created": card.created,
        "owned_by": "ktransformers",
        "max_model_len": status.max_len if status is not None and status.ready else None,
    }


@router.get("/v1/models", operation_id="list_models")
@requires(Role.USER)
async def list_models(request: Request) -> Response:
    """The one model there is, if the caller may use it."""
    context = context_of(request)
    allowed = context.caller.may_use(context.generator.model_name)
    return _json({"object": "list", "data": [_model(context)] if allowed else []})


@router.get("/v1/models/{model:path}", operation_id="get_model")
@requires(Role.USER)
async def get_model(model: str, request: Request) -> Response:
    """One model by its id."""
    context = context_of(request)
    context.generator.check_model(model, context.caller)
    return _json(_model(context))


# ---- chat completions


@router.post("/v1/chat/completions", operation_id="create_chat_completion", responses=_STREAMED)
@requires(Role.USER, REQUEST)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Answer a conversation."""
    context = context_of(request)
    generator = context.generator
    generator.admit(body.model, context.caller)

    async def start() -> Generation:
        messages = [message.for_template() for message in body.messages]
        prompt = await generator.chat_prompt(
            messages, body.think, "reasoning_effort", body.chat_template_kwargs
        )
        patience = QUEUE_PATIENCE if body.stream else None
        generation = await generator.start(
            [prompt], body.to_parameters(), context.caller, patience=patience
        )
        context.headers.update(generation.headers)
        return generation

    head = _Head("chatcmpl", "chat.completion", generator.model_name)
    if body.stream:
        generation = await while_connected(request.receive, start())
        return _event_stream(_chat_chunks(generation, head, body, generator.text.tokenizer))
    return _json(
        await while_connected(request.receive, _chat_answer(start, head, body, generator.text.tokenizer))
    )


class _Head:
    """What every object of one answer begins with."""

    def __init__(self, prefix: str, kind: str, model: str) -> None:
        self.fields = {
            "id": f"{prefix}-{secrets.token_hex(16)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    def chunk(self, kind: str) -> bytes:
        """`data: {"id": ..., "choices":[` of a stream's chunks."""
        return b"data: " + encode(self.fields | {"object": kind})[:-1] + b',"choices":['


def _event_stream(chunks: AsyncGenerator[bytes, None]) -> ByteStream:
    return ByteStream(with_error_event(chunks, _error_event), "text/event-stream", SSE_IDLE)


class _Folded:
    """The deltas of one choice put together."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.reasoning: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish = ""


async def _fold(generation: Generation, n: int) -> list[_Folded]:
    choices = [_Folded() for _ in range(n)]
    async with aclosing(generation) as deltas:
        async for delta in deltas:
            choice = choices[delta.index]
            choice.text.append(delta.text)
            choice.reasoning.append(delta.reasoning)
            choice.logprobs.extend(delta.logprobs)
            choice.finish = delta.finish
    return choices


def _message(choice: _Folded) -> dict[str, Any]:
    """`reasoning_content`, as other servers call it, is there when the model has thought."""
    reasoning = "".join(choice.reasoning)
    message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
    return message | {"reasoning_content": reasoning} if reasoning else message


async def _chat_answer(start: Any, head: _Head, body: ChatRequest, pieces: Pieces) -> dict[str, Any]:
    generation = await start()
    choices = [
        {
            "index": index,
            "message": _message(choice),
            "logprobs": logprobs.chat(pieces, choice.logprobs) if body.logprobs else None,
            "finish_reason": choice.finish,
        }
        for index, choice in enumerate(await _fold(generation, body.n or 1))
    ]
    return head.fields | {"choices": choices, "usage": _usage(generation.usage), "service_tier": "default"}


async def _chat_chunks(
    generation: Generation, head: _Head, body: ChatRequest, pieces: Pieces
) -> AsyncGenerator[bytes, None]:
    """Bytes around each piece of text are made once: this runs for every token of every stream."""
    start = head.chunk("chat.completion.chunk")
    end = b'],"usage":null}\n\n' if body.include_usage else b"]}\n\n"
    before = [b"%b" % start + b'{"index":%d,"delta":{"content":' % i for i in range(body.n or 1)]
    after = b'},"logprobs":null,"finish_reason":null}' + end
    seen = [False] * len(before)
    async with aclosing(generation) as deltas:
        async for delta in deltas:
            i, sent = delta.index, b""
            if not seen[i]:
                seen[i] = True
                sent = (
                    start
                    + (
                        b'{"index":%d,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,'
                        b'"finish_reason":null}' % i
                    )
                    + end
                )
            if delta.reasoning:
                thought = b'{"index":%d,"delta":{"reasoning_content":' % i + encode(delta.reasoning)
                sent += start + thought + after
            if delta.logprobs:
                found = encode(logprobs.chat(pieces, delta.logprobs))
                sent += (
                    before[i]
                    + encode(delta.text)
                    + b'},"logprobs":'
                    + found
                    + b',"finish_reason":null}'
                    + end
                )
            elif delta.text:
                sent += before[i] + encode(delta.text) + after
            if delta.finish:
                sent += (
                    start
                    + b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"}'
                    % (i, delta.finish.encode())
                    + end
                )
            yield sent
    yield _last(start, body.include_usage, generation.usage)


def _last(start: bytes, include_usage: bool, usage: Usage) -> bytes:
    if not include_usage:
        return _DONE
    return start + b'],"usage":' + encode(_usage(usage)) + b"}\n\n" + _DONE


# ---- legacy completions


@router.post("/v1/completions", operation_id="create_completion", responses=_STREAMED)
@requires(Role.USER, REQUEST)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Continue one or more prompts."""
    context = context_of(request)
    generator = context.generator
    generator.admit(body.model, context.caller)
    prompts = body.prompts()

    async def start() -> Generation:
        tokens = [
            await generator.text_prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts
        ]
        patience = QUEUE_PATIENCE if body.stream else None
        generation = await generator.start(
            tokens, body.to_parameters(), context.caller, continues=True, patience=patience
        )
        context.headers.update(generation.headers)
        return generation

    head = _Head("cmpl", "text_completion", generator.model_name)
    n = len(prompts) * (body.n or 1)
    if body.stream:
        generation = await while_connected(request.receive, start())
        return _event_stream(_completion_chunks(generation, head, body, n, generator.text.tokenizer))
    return _json(
        await while_connected(
            request.receive, _completion_answer(start, head, body, n, generator.text.tokenizer)
        )
    )


async def _completion_answer(
    start: Any, head: _Head, body: CompletionRequest, n: int, pieces: Pieces
) -> dict[str, Any]:
    generation = await start()
    choices = [
        {
            "index": index,
            "text": "".join(choice.text),
            "logprobs": logprobs.completion(pieces, choice.logprobs, 0)
            if body.logprobs is not None
            else None,
            "finish_reason": choice.finish,
        }
        for index, choice in enumerate(await _fold(generation, n))
    ]
    return head.fields | {"choices": choices, "usage": _usage(generation.usage)}


async def _completion_chunks(
    generation: Generation, head: _Head, body: CompletionRequest, n: int, pieces: Pieces
) -> AsyncGenerator[bytes, None]:
    start = head.chunk("text_completion")
    end = b'],"usage":null}\n\n' if body.include_usage else b"]}\n\n"
    before = [start + b'{"index":%d,"text":' % i for i in range(n)]
    after = b',"logprobs":null,"finish_reason":null}' + end
    offsets = [0] * n
    async with aclosing(generation) as deltas:
        async for delta in deltas:
            i = delta.index
            if not delta.finish and not delta.logprobs:
                yield before[i] + encode(delta.text) + after
                continue
            found = logprobs.completion(pieces, delta.logprobs, offsets[i]) if delta.logprobs else None
            if found is not None:
                offsets[i] += sum(map(len, found["tokens"]))
            yield (
                before[i]
                + encode(delta.text)
                + b',"logprobs":'
                + encode(found)
                + b',"finish_reason":'
                + encode(delta.finish or None)
                + b"}"
                + end
            )
    yield _last(start, body.include_usage, generation.usage)
