"""The path of a request: prompt -> tokens -> submit -> events -> text -> stop strings -> finish.

Every API is a thin translation onto `Generator`; an answer that is not streamed folds the same stream.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Protocol

import msgspec

from ktransformers.scheduler.client import RequestFailed
from ktransformers.scheduler.protocol import Status, Submit, TokenEvent
from ktransformers.server.accounting import Account, Counted, Usage
from ktransformers.server.auth import Caller
from ktransformers.server.deltas import (
    Delta,
    Generation,
    Parameters,
    TokenLogprob,
    abandon,
    accounted,
    merged,
)
from ktransformers.server.errors import RequestError
from ktransformers.server.metrics import Metrics
from ktransformers.server.refusals import Refusals
from ktransformers.server.tenants.directory import narrowed
from ktransformers.server.tenants.ledger import Ledger
from ktransformers.server.tenants.limits import Limiter
from ktransformers.server.text.answer import AnswerText
from ktransformers.server.text.detokenizer import Pieces
from ktransformers.server.text.messages import ArgumentError, MessageError, ThinkingError
from ktransformers.server.text.reasoning import Markers
from ktransformers.server.text.templates import TemplateError
from ktransformers.server.text.tokenizer import TooLongError

DEFAULT_MODEL = "default"
"""Stands for the served model, whatever it is."""
SEEDS = 1 << 63
QUEUE_PATIENCE = 15.0
"""Seconds that a stream's status waits for its first token: after that the client is told that it is in the
queue, for the sake of proxies that give up on a silent server after a minute."""

log = logging.getLogger("ktransformers.server.generation")


class Scheduler(Protocol):
    """What this needs of scheduler.client.SchedulerClient."""

    @property
    def status(self) -> Status | None:
        """The last status if it is fresh."""
        ...

    def submit(self, submit: Submit) -> AsyncGenerator[TokenEvent, None]:
        """The events of one request. Errors: RequestFailed."""
        ...

    def cancel(self, id: str) -> None:  # noqa: A002
        """End a request with "cancelled"."""
        ...

    def drain(self) -> None:
        """Refuse new requests."""
        ...

    def withdraw(self, tokens: list[int]) -> bool:
        """Nobody finds these tokens' public KV any more."""
        ...


class Tokenizer(Pieces, Protocol):
    """What this needs of server.text.tokenizer.Tokenizer."""

    vocab_size: int
    eog_ids: frozenset[int]
    """Tokens that end an answer."""


class Text(Protocol):
    """What this needs of server.text.model.TextModel."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Ids of tokens and what they stand for."""
        ...

    @property
    def markers(self) -> Markers:
        """What tells the model's reasoning from its answers."""
        ...

    async def chat_ids_async(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        arguments: Mapping[str, object] | None,
        limit: int | None,
        think: bool | str | None,
    ) -> list[int]:
        """Tokens of a conversation up to where the answer begins. Errors: MessageError, TemplateError,
        TooLongError."""
        ...

    async def prompt_ids_async(self, text: str, limit: int | None) -> list[int]:
        """Tokens of plain text. Errors: TooLongError."""
        ...


class Generator:
    """Text in, text out, by way of the scheduler. One for each process, used on its event loop."""

    def __init__(
        self,
        model_name: str,
        text: Text,
        scheduler: Scheduler,
        metrics: Metrics,
        request_timeout: float = 0.0,
        limiter: Limiter | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        """Without `limiter` and `ledger` nothing that is used is kept beyond this process."""
        self.model_name = model_name
        self.text = text
        self.scheduler = scheduler
        self.draining = False
        self.ledger = ledger or Ledger()
        self._limiter = limiter or Limiter()
        self.metrics = metrics
        self._deadline = request_timeout
        self._open: set[str] = set()
        self._stopped = False
        self._refusals = Refusals()

    def check_model(self, name: str, caller: Caller) -> None:
        """Raises RequestError unless `name` is the served model's, with or without Ollama's tag, or
        "default", and the caller may use it. Every route that names a model asks here; the error does not
        tell a model that is not there from one that is kept from the caller."""
        known = name.removesuffix(":latest") in (self.model_name.removesuffix(":latest"), DEFAULT_MODEL)
        if not known or not caller.may_use(self.model_name):
            what = f"model '{name[:256]}' not found; /v1/models lists those that are here"
            raise RequestError("model_not_found", what, "model")

    def admit(self, name: str, caller: Caller) -> None:
        """The same for a request that is to be answered: refused here, it costs nothing."""
        self.check_model(name, caller)
        self.refuse_early(caller)

    def refuse_early(self, caller: Caller) -> None:
        """Before its body is read: if the caller's own limits leave no room for any, or the scheduler has
        just refused it. Raises RequestError."""
        with self._rejections(caller):
            self._limiter.check(caller.limits)
            self._refusals.check(caller.tenant)

    @contextmanager
    def _rejections(self, caller: Caller) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            self.metrics.tenants.of(caller.name, caller.tenant).rejected(error.code)
            raise

    # ---- prompts

    async def chat_prompt(
        self,
        messages: Sequence[Mapping[str, object]],
        think: bool | str | None = None,
        think_name: str = "think",
        arguments: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Tokens of a conversation through the model's own template. `think`, which the client calls
        `think_name`, and `arguments` as TextModel.chat_text has them. Raises RequestError."""
        context = self.context()
        try:
            return await self.text.chat_ids_async(messages, arguments=arguments, limit=context, think=think)
        except ArgumentError as error:
            raise RequestError("unsupported_parameter", str(error), "chat_template_kwargs") from None
        except ThinkingError as error:
            raise RequestError("unsupported_parameter", f"'{think_name}': {error}", think_name) from None
        except MessageError as error:
            raise RequestError("invalid_value", str(error), "messages") from None
        except TemplateError as error:
            raise RequestError("invalid_request", str(error), "messages") from None
        except TooLongError:
            raise _too_long(context, "messages") from None

    async def text_prompt(self, text: str) -> list[int]:
        """Tokens of plain text, in which nothing is a special token. Raises RequestError."""
        context = self.context()
        try:
            return await self.text.prompt_ids_async(text, context)
        except TooLongError:
            raise _too_long(context, "prompt") from None

    def context(self) -> int:
        """Longest sequence in tokens. Raises RequestError while the engine is not ready."""
        if self.draining:
            raise RequestError("draining", "the server is shutting down", retry_after=5)
        status = self.scheduler.status
        if status is None or not status.ready:
            detail = "the scheduler is not running" if status is None else status.detail
            raise RequestError("not_ready", f"not ready: {detail}", retry_after=2)
        return status.max_len

    # ---- generation

    async def start(
        self,
        prompts: Sequence[list[int]],
        parameters: Parameters,
        caller: Caller,
        continues: bool = False,
        patience: float | None = None,
    ) -> Generation:
        """Submit, and wait for the first delta, so that what fails before it can still be an HTTP status; but
        no longer than `patience` seconds.

        Choice j of prompt i has index i * n + j. `continues`: the output goes on with the prompt's text, so
        that a space before its first word is part of it. Raises RequestError.
        """
        usage = Usage(prompt_tokens=sum(len(prompt) for prompt in prompts))
        submits = [submit for prompt in prompts for submit in self._submits(prompt, parameters, caller)]
        output = sum(submit.sampling.max_tokens for submit in submits)
        with self._rejections(caller):
            reservation = self._limiter.reserve(caller.limits, usage.prompt_tokens, output, len(submits))
        account = Account(
            usage, self.ledger, reservation, self.metrics.tenants.of(caller.name, caller.tenant),
            (caller.tenant, caller.key, self.model_name),
        )  # fmt: skip
        choices = [
            self._choice(index, submit, parameters.stop, continues, account, index // parameters.n)
            for index, submit in enumerate(submits)
        ]
        deltas = accounted(choices[0] if len(choices) == 1 else merged(choices), account)
        first = asyncio.ensure_future(anext(deltas))
        try:
            await asyncio.wait({first}, timeout=patience)
            if first.done():
                first.result()
        except BaseException:
            await abandon(first)
            await deltas.aclose()
            raise
        return Generation(first, deltas, usage, reservation.headers)

    def _submits(self, prompt: list[int], parameters: Parameters, caller: Caller) -> list[Submit]:
        """One Submit for each choice. Raises RequestError for what does not fit."""
        longest = self.context()
        if parameters.context is not None:
            longest = min(longest, parameters.context)
        if not prompt:
            raise _invalid("prompt", "is empty")
        room = longest - len(prompt)
        if room < 1:
            raise _too_long(longest, None)
        vocabulary = self.text.tokenizer.vocab_size
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise _invalid("prompt", f"token ids must be 0 .. {vocabulary - 1}")
        wanted = parameters.max_tokens
        if wanted is not None and wanted > longest:
            raise _invalid(parameters.limit_name, f"the context of this model has {longest} tokens")
        sampling = parameters.sampling
        if sampling.top_k > vocabulary:
            raise _invalid("top_k", f"the vocabulary of this model has {vocabulary} tokens")
        for name, tokens in (
            ("stop_token_ids", sampling.stop_tokens),
            ("logit_bias", tuple(token for token, _ in sampling.logit_bias)),
        ):
            if any(not 0 <= token < vocabulary for token in tokens):
                raise _invalid(name, f"token ids must be 0 .. {vocabulary - 1}")
        limit = room if wanted is None else min(wanted, room)
        if sampling.min_tokens > limit:
            raise _invalid("min_tokens", f"the output may have {limit} tokens")
        ends = () if parameters.ignore_eos else tuple(sorted(self.text.tokenizer.eog_ids))
        seed = secrets.randbits(63) if parameters.seed is None else parameters.seed
        return [
            Submit(
                id=secrets.token_hex(16),
                tenant=caller.share,
                tokens=prompt,
                deadline=self._deadline,
                cache_scope=narrowed(caller.cache_scope, parameters.cache_salt),
                sampling=msgspec.structs.replace(
                    sampling,
                    seed=(seed + i) % SEEDS,
                    max_tokens=limit,
                    stop_tokens=tuple(dict.fromkeys(sampling.stop_tokens + ends)),
                ),
            )
            for i in range(parameters.n)
        ]

    async def _choice(
        self,
        index: int,
        submit: Submit,
        stop: tuple[str, ...],
        continues: bool,
        account: Account,
        prompt: int,
    ) -> AsyncGenerator[Delta, None]:
        """The deltas of one choice. Leaving it early, as a stop string does, cancels the work."""
        answer: AnswerText[TokenLogprob] = AnswerText(
            self.text.tokenizer, stop, self.text.markers.reasoning(submit.tokens), continues
        )
        ends = submit.sampling.stop_tokens
        counted = Counted(self.metrics, account, prompt, len(submit.tokens), answer.reasoning)
        self._open.add(submit.id)
        self._refusals.join(account.tenant)
        waits = True
        try:
            async with aclosing(self.scheduler.submit(submit)) as events:
                async for event in events:
                    if waits:
                        waits = False
                        self._refusals.leave(account.tenant)
                    delta = _delta(index, event, ends, answer)
                    counted.event(event)
                    if event.finish == "cancelled":
                        raise self._cut_off()
                    if delta.finish:
                        counted.finish(delta.finish)
                    if delta.text or delta.reasoning or delta.finish or delta.logprobs:
                        yield delta
                    if delta.finish:
                        return
        except RequestFailed as error:
            # The scheduler's word for a limit of the tenant's own, in the clients' protocol.
            code = "rate_limit_exceeded" if error.code == "rate_limited" else error.code
            counted.fail(code)
            failure = RequestError(code, error.message, retry_after=error.retry_after)
            if waits and code in ("rate_limit_exceeded", "overloaded"):
                waits = False
                self._refusals.refused(account.tenant, failure)
            raise failure from None
        except RequestError as error:
            counted.fail(error.code)
            raise
        finally:
            if waits:
                self._refusals.leave(account.tenant)
            counted.leave()
            self._open.discard(submit.id)

    def _cut_off(self) -> RequestError:
        """Why a request was cancelled that the client did not leave."""
        if self._stopped:
            return RequestError("server_shutdown", "the server shut down before the answer was complete")
        return RequestError("internal", "the request was cancelled because its answer was not read in time")

    # ---- shutting down

    @property
    def open_choices(self) -> int:
        """Choices that have not ended."""
        return len(self._open)

    def drain(self) -> None:
        """Refuse what is new; what runs goes on."""
        self.draining = True
        self.scheduler.drain()

    async def stop(self, timeout: float) -> bool:
        """Wait until everything has ended, at most `timeout` seconds, then end the rest with
        "server_shutdown".

        Returns whether nothing had to be cut off.
        """
        give_up = time.monotonic() + timeout
        while self._open and time.monotonic() < give_up:
            await asyncio.sleep(0.05)
        cut_off = len(self._open)
        self._stopped = True
        for request in list(self._open):
            self.scheduler.cancel(request)
        if cut_off:
            log.warning("shutting down: %d requests did not end within %.0f s", cut_off, timeout)
        return cut_off == 0


def _delta(index: int, event: TokenEvent, ends: Sequence[int], answer: AnswerText[TokenLogprob]) -> Delta:
    """What an event adds to an answer. The token of `ends` that ended it is no part of it."""
    tokens = event.tokens
    if event.finish == "stop" and tokens and tokens[-1] in ends:
        tokens = tokens[:-1]
    marks: Sequence[TokenLogprob] = ()
    if found := event.logprobs:
        marks = [TokenLogprob(token, found[i].logprob, found[i].top) for i, token in enumerate(tokens)]
    piece = answer.feed(tokens, event.finish, marks)
    return Delta(index, piece.text, piece.finish, piece.marks, piece.reasoning)


def _invalid(name: str, why: str) -> RequestError:
    return RequestError("invalid_value", f"'{name}': {why}", name)


def _too_long(context: int, param: str | None) -> RequestError:
    message = f"the prompt does not fit: the context has {context} tokens"
    return RequestError("context_length_exceeded", message, param)
