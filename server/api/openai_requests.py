"""What OpenAI clients send: /v1/chat/completions and /v1/completions, with the extra fields that vLLM made
usual."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from ktransformers.scheduler.protocol import Sampling
from ktransformers.server.api.parameters import (
    LIST,
    LISTS,
    NUMBERS,
    ONE,
    ONE_OR_LIST,
    Bias,
    CacheSalt,
    Choices,
    Label,
    Logprobs,
    MinP,
    Penalty,
    RepetitionPenalty,
    Seed,
    Stop,
    StrictModel,
    Temperature,
    TokenCount,
    TokenId,
    TokenIds,
    TopP,
    at_most,
    to_seed,
)
from ktransformers.server.deltas import Parameters

Biases = Annotated[dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], Bias], at_most(300)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Label], at_most(16)]


class StreamOptions(StrictModel):
    """How a stream ends."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        "include_obfuscation": (None, False),
        "continuous_usage_stats": (None, False),
    }
    include_usage: bool | None = None


class SampledRequest(StrictModel):
    """What chat and legacy completions have in common."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        "best_of": (None, 1),
        "echo": (None, False),
        "use_beam_search": (None, False),
        "length_penalty": (None, 1, 1.0),
        "include_stop_str_in_output": (None, False),
        "skip_special_tokens": (None, True),
        "spaces_between_special_tokens": (None, True),
        "truncate_prompt_tokens": (None,),
        "prompt_logprobs": (None,),
        "priority": (None, 0),
    }
    model: Annotated[str, Field(max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Choices | None = None
    max_tokens: TokenCount | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: Annotated[int, Field(ge=-1, le=1 << 24)] | None = None
    """-1 and 0 keep all."""
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: Biases | None = None
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1 << 24)] | None = None
    seed: Seed | None = None
    user: Label | None = None
    cache_salt: CacheSalt | None = None
    """Its KV is found only by requests of the same tenant with the same salt."""

    def parameters(self, max_tokens: int | None, logprobs: int, limit_name: str = "max_tokens") -> Parameters:
        """The internal form; `logprobs` as in Sampling."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        sampling = Sampling(
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_k=max(0, self.top_k or 0),
            min_p=float(self.min_p or 0.0),
            presence_penalty=float(self.presence_penalty or 0.0),
            frequency_penalty=float(self.frequency_penalty or 0.0),
            repetition_penalty=1.0 if self.repetition_penalty is None else float(self.repetition_penalty),
            logit_bias=tuple((int(token), float(bias)) for token, bias in (self.logit_bias or {}).items()),
            stop_tokens=tuple(self.stop_token_ids or ()),
            min_tokens=self.min_tokens or 0,
            logprobs=logprobs,
        )
        return Parameters(
            sampling,
            max_tokens,
            None if self.seed is None else to_seed(self.seed),
            self.n or 1,
            stop,
            bool(self.ignore_eos),
            cache_salt=self.cache_salt or "",
            limit_name=limit_name,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "SampledRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("unsupported", "needs stream=true", {"param": "stream_options"})
        return self


class TextPart(StrictModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


Parts = Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=2048)]
Content = Annotated[Annotated[str, Tag(ONE)] | Annotated[Parts, Tag(LIST)], ONE_OR_LIST]


class Message(StrictModel):
    """One turn. What `name` does is up to the model's template."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        "tool_calls": (None, []),
        "function_call": (None,),
        "audio": (None,),
        "refusal": (None,),
        "tool_call_id": (None,),
        "annotations": (None, []),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As server.text takes it, which knows what templates expect."""
        return self.model_dump(exclude_none=True)


class ResponseFormat(StrictModel):
    """Plain text only."""

    type: Literal["text"]


class ChatRequest(SampledRequest):
    """POST /v1/chat/completions."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        **SampledRequest.neutral,
        "add_generation_prompt": (None, True),
        "continue_final_message": (None, False),
        "chat_template": (None,),
        "tools": (None, []),
        "tool_choice": (None, "none", "auto"),
        "parallel_tool_calls": (None, True, False),
        "functions": (None, []),
        "function_call": (None, "none", "auto"),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "prediction": (None,),
        "web_search_options": (None,),
        "verbosity": (None, "medium"),
        "service_tier": (None, "auto", "default"),
        "store": (None, False),
        "moderation": (None,),
        "prompt_cache_retention": (None,),
        "prompt_cache_options": (None,),
    }
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=2048)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    response_format: ResponseFormat | None = None
    metadata: Metadata | None = None
    chat_template_kwargs: Annotated[dict[str, Any], at_most(16)] | None = None
    """For the template: which ones there are, server/text/messages.py says."""
    reasoning_effort: Literal["none", "low", "medium", "high"] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("unsupported", "needs logprobs=true", {"param": "top_logprobs"})
        return self

    @property
    def think(self) -> bool | str | None:
        """Whether the model shall think, or how much."""
        return False if self.reasoning_effort == "none" else self.reasoning_effort

    def to_parameters(self) -> Parameters:
        """The internal form; max_completion_tokens is the newer name and wins."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else -1
        if self.max_completion_tokens is None:
            return self.parameters(self.max_tokens, logprobs)
        return self.parameters(self.max_completion_tokens, logprobs, "max_completion_tokens")


Tokens = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=1 << 20)]
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=16)]
TokenLists = Annotated[list[Tokens], Field(fail_fast=True, min_length=1, max_length=16)]


def _kind_of_prompt(prompt: Any) -> str:
    """Which of the four forms is meant, so that a long list is not held against the three others."""
    if not isinstance(prompt, list):
        return ONE
    first = prompt[0] if prompt else 0
    return LIST if isinstance(first, str) else LISTS if isinstance(first, list) else NUMBERS


class CompletionRequest(SampledRequest):
    """POST /v1/completions."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {**SampledRequest.neutral, "suffix": (None,)}
    prompt: Annotated[
        Annotated[str, Tag(ONE)]
        | Annotated[Texts, Tag(LIST)]
        | Annotated[Tokens, Tag(NUMBERS)]
        | Annotated[TokenLists, Tag(LISTS)],
        Discriminator(_kind_of_prompt),
    ]
    logprobs: Logprobs | None = None

    def to_parameters(self) -> Parameters:
        """The internal form; 16 tokens is the protocol's default."""
        return self.parameters(
            16 if self.max_tokens is None else self.max_tokens, -1 if self.logprobs is None else self.logprobs
        )

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
