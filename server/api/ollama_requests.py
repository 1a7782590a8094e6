"""What Ollama's clients send: /api/chat, /api/generate, /api/show."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from ktransformers.scheduler.protocol import Sampling
from ktransformers.server.api.parameters import (
    ONE,
    WORD,
    Logprobs,
    MinP,
    Penalty,
    RepetitionPenalty,
    Seed,
    Stop,
    StrictModel,
    Temperature,
    to_seed,
)
from ktransformers.server.deltas import Parameters

Think = Annotated[
    Annotated[bool, Tag(ONE)] | Annotated[Literal["low", "medium", "high"], Tag(WORD)],
    Discriminator(lambda value: WORD if isinstance(value, str) else ONE),
]
Name = Annotated[str, Field(max_length=256)]


class Options(StrictModel):
    """How to sample. The defaults are Ollama's, not OpenAI's. What belongs to loading a model is refused."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        "typical_p": (None, 1, 1.0),
        "tfs_z": (None, 1, 1.0),
        "mirostat": (None, 0),
        "draft_num_predict": (None, 0),
        "num_keep": (None, 0, 4, -1),
        "num_gpu": (None, -1),
        "num_thread": (None, 0),
        "main_gpu": (None, 0),
        "num_batch": (None,),
        "use_mmap": (None, True),
        "penalize_newline": (None, True),
    }
    num_predict: Annotated[int, Field(ge=-2, le=1 << 24)] | None = None
    """0 and less: as many as the context has room for."""
    num_ctx: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    temperature: Temperature | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 24)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    min_p: MinP | None = None
    repeat_penalty: RepetitionPenalty | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, le=1 << 24)] | None = None
    """-1: the whole context; 0: no repeat penalty."""
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    """Negative: a random one."""
    stop: Stop | None = None

    def parameters(self, logprobs: int, longest: int) -> Parameters:
        """The internal form; `logprobs` as in Sampling. As in Ollama, what is more than the model's `longest`
        sequence stands for that: clients set their numbers for all models alike.
        """
        window = 64 if self.repeat_last_n is None else self.repeat_last_n
        sampling = Sampling(
            temperature=0.8 if self.temperature is None else float(self.temperature),
            top_k=40 if self.top_k is None else self.top_k,
            # Keeping a share of nothing keeps the likeliest token, which is what greedy does.
            top_p=0.9 if self.top_p is None else max(float(self.top_p), 1e-6),
            min_p=float(self.min_p or 0.0),
            repetition_penalty=1.0
            if window == 0
            else 1.1
            if self.repeat_penalty is None
            else float(self.repeat_penalty),
            repetition_window=max(0, window),
            presence_penalty=float(self.presence_penalty or 0.0),
            frequency_penalty=float(self.frequency_penalty or 0.0),
            logprobs=logprobs,
        )
        limit = min(self.num_predict, longest) if self.num_predict and self.num_predict > 0 else None
        context = None if self.num_ctx is None else min(self.num_ctx, longest)
        seed = None if self.seed is None or self.seed < 0 else to_seed(self.seed)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Parameters(sampling, limit, seed, 1, stop, context=context)


class OllamaRequest(StrictModel):
    """What chat and generate have in common. `keep_alive` changes nothing: the model stays loaded."""

    model: Name
    stream: bool | None = None
    options: Options | None = None
    keep_alive: Annotated[str, Field(max_length=32)] | int | float | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    think: Think | None = None

    def parameters(self, longest: int) -> Parameters:
        """The internal form for a model with sequences of at most `longest` tokens."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else -1
        return (self.options or Options()).parameters(logprobs, longest)


_NOT_DONE: Mapping[str, Sequence[Any]] = {
    "format": (None, ""),
    "truncate": (None, False),
    "shift": (None, False),
}


class OllamaMessage(StrictModel):
    """One turn."""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        "images": (None, []),
        "tool_calls": (None, []),
        "tool_name": (None, ""),
        "tool_call_id": (None, ""),
    }
    role: Literal["system", "user", "assistant"]
    content: str | None = None
    thinking: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.thinking is not None:
            message["reasoning_content"] = self.thinking
        return message


class OllamaChatRequest(OllamaRequest):
    """POST /api/chat. No message: is the model there?"""

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {**_NOT_DONE, "tools": (None, [])}
    messages: Annotated[list[OllamaMessage], Field(fail_fast=True, max_length=2048)] | None = None


class OllamaGenerateRequest(OllamaRequest):
    """POST /api/generate. No prompt: is the model there? `raw` takes the prompt as it is, without a
    template.
    """

    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {
        **_NOT_DONE,
        "suffix": (None, ""),
        "template": (None, ""),
        "context": (None, []),
        "images": (None, []),
    }
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None


class ShowRequest(StrictModel):
    """POST /api/show; `name` is what old clients call it."""

    model: Name | None = None
    name: Name | None = None
    verbose: bool | None = None
