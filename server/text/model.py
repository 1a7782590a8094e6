"""Everything about a model that is text: tokenizer, chat template, and what its file says of it.

The server may import one part of the engine's room, `engine.weights`: those are the parsers of model files,
and a second parser of hostile files would be a second set of holes.
"""

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ktransformers.engine.weights.contents import stored_tensors
from ktransformers.engine.weights.formats import FORMATS
from ktransformers.engine.weights.gguf import GgufFile
from ktransformers.engine.weights.gguf import read as read_gguf
from ktransformers.engine.weights.safetensors import read_folder
from ktransformers.server.text import messages as chat
from ktransformers.server.text.folder import read_folder_text
from ktransformers.server.text.reasoning import Markers
from ktransformers.server.text.templates import FALLBACKS, ChatTemplate, TemplateError
from ktransformers.server.text.tokenizer import Tokenizer
from ktransformers.server.text.vocabulary import VocabularyError

_SHORT: Final = 4096
"""Characters that are encoded in the event loop itself: under 2 ms, less than a thread's turn may cost."""
_THREADS: Final = 2
_TEMPLATE_GROWTH: Final = 4
_TEMPLATE_CHARS: Final = 2**18
"""A template writes at most _TEMPLATE_GROWTH characters for each of the conversation's, and these."""

# https://github.com/ggml-org/llama.cpp/blob/master/include/llama.h, enum llama_ftype: the name of
# `general.file_type`.
_FILE_TYPES: Final[Mapping[int, str]] = dict(
    [
        *enumerate(("F32", "F16", "Q4_0", "Q4_1")),
        *enumerate(("Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M"), 7),
        *enumerate(("Q5_K_S", "Q5_K_M", "Q6_K", "IQ2_XXS", "IQ2_XS", "Q2_K_S", "IQ3_XS", "IQ3_XXS"), 16),
        *enumerate(("IQ1_S", "IQ4_NL", "IQ3_S", "IQ3_M", "IQ2_S", "IQ2_M", "IQ4_XS", "IQ1_M", "BF16"), 24),
        *enumerate(("TQ1_0", "TQ2_0", "MXFP4"), 36),
    ]
)


class NoTemplateError(TemplateError):
    """The model has no chat template, and none of the known formats is its."""


@dataclass(frozen=True)
class ModelFacts:
    """What lists of models show."""

    name: str
    """`general.name`, or the name of the file or folder."""
    architecture: str
    """`general.architecture` or `model_type`: "llama", "qwen2", ..."""
    parameters: int
    """Weights, counted from the tensors."""
    quantization: str
    """The format of most of the weights: "Q4_K_M", "F16", ..."""
    context_length: int
    """Tokens that the model was trained on; 0 when the file does not say."""
    embedding_length: int
    file_bytes: int
    license: str

    @property
    def parameter_size(self) -> str:
        """As people write it: "135M", "7.6B"."""
        for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
            if self.parameters >= unit:
                value = self.parameters / unit
                return f"{value:.1f}{name}" if value < 100 and unit >= 10**9 else f"{value:.0f}{name}"
        return str(self.parameters)


class TextModel:
    """Text in and out of one model. May be used from any thread; an event loop uses the async methods.

    Attributes:
        facts: Name, sizes, formats.
        tokenizer: The vocabulary.
        template: The chat template, or None.
        has_tools: Whether the template shows tools to the model.
        markers: What tells its reasoning from its answers.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None, facts: ModelFacts) -> None:
        source = template if template is not None else _fallback(tokenizer)
        self.tokenizer = tokenizer
        self.facts = facts
        self.template = None if source is None else ChatTemplate(source)
        self.has_tools = source is not None and "tools" in source
        self.markers = Markers(tokenizer)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="text")

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str]) -> "TextModel":
        """Blocks for 0.1 to 3 s, by the size of the vocabulary. Raises GgufError, VocabularyError."""
        file = read_gguf(path)
        template = file.metadata.get("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise VocabularyError("tokenizer.chat_template: not a string")
        return cls(Tokenizer.from_metadata(file.metadata), template, _facts(file))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TextModel":
        """A GGUF file or a folder in Hugging Face's layout. Blocks for 0.1 to 3 s, by the size of the
        vocabulary. Raises GgufError, FolderError, VocabularyError."""
        if not Path(path).is_dir():
            return cls.from_gguf(path)
        text = read_folder_text(Path(path))
        tokenizer = Tokenizer(text.vocabulary, text.rust, text.inner)
        return cls(tokenizer, text.template, _folder_facts(Path(path), text.config))

    def chat_text(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] = (),
        arguments: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
        think: bool | str | None = None,
    ) -> list[str | int]:
        """Render a conversation: pieces of plain text, and ids where the template wrote a control token.

        `messages` and `tools` are OpenAI's JSON objects (messages.py says which); `arguments` the client's
        chat_template_kwargs; `think` whether, or how much, the model shall think
        (messages.thinking_arguments). Whatever clients write stays plain text. Blocks up to a second
        (ChatTemplate.render). Raises TemplateError and MessageError, both for the client to see,
        NoTemplateError among them.
        """
        if self.template is None:
            raise NoTemplateError("this model has no chat template; use the completions API")
        source = self.template.source
        conversation = chat.template_messages(messages)
        given = chat.template_arguments(arguments or {})
        if tools and not self.has_tools:
            raise TemplateError("this model's chat template does not support tools")
        if "tool_calls" not in source and any("tool_calls" in message for message in conversation):
            raise TemplateError("this model's chat template does not support tool_calls")
        variables, thinks = self.template.variables(), self.markers.thinks
        if not thinks:  # off is what it is already
            given = {name: value for name, value in given.items() if name in variables or value is not False}
        if unknown := [name for name in given if name not in variables]:
            what = f"chat_template_kwargs: this model's chat template does not know {', '.join(unknown)}"
            raise chat.ArgumentError(what)
        if think is not None:
            given = chat.thinking_arguments(think, variables, thinks) | given
        special = self.tokenizer.special_tokens
        given |= {"messages": conversation, "tools": list(tools) or None}
        guarded, mark = chat.guard(given, special, source)
        if not isinstance(guarded, dict):
            raise TypeError(type(guarded))
        context = {
            **self._names(),
            **guarded,
            "add_generation_prompt": add_generation_prompt,
            "documents": None,
        }
        size = sum(map(len, chat.strings(guarded)))
        text = self.template.render(context, _TEMPLATE_GROWTH * size + _TEMPLATE_CHARS)
        cut = special.split(text, mark)
        pieces = [piece if isinstance(piece, int) else piece.replace(mark, "") for piece in cut]
        bos = self.tokenizer.bos_id
        if self.tokenizer.add_bos and bos is not None and pieces[:1] != [bos]:
            return [bos, *pieces]
        return pieces

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] = (),
        arguments: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
        limit: int | None = None,
        think: bool | str | None = None,
    ) -> list[int]:
        """The prompt's ids: `chat_text`, encoded. Raises TooLongError for more than `limit` tokens, too."""
        if limit is not None:
            # Before the template: 16 MiB keep it, and everybody who waits for it, for seconds.
            contents = sum(len(text) for message in messages for text in chat.strings(message.get("content")))
            self.tokenizer.refuse_characters(contents, limit)
        pieces = self.chat_text(messages, tools, arguments, add_generation_prompt, think)
        return self.tokenizer.encode_pieces(pieces, limit)

    async def chat_ids_async(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] = (),
        arguments: Mapping[str, object] | None = None,
        add_generation_prompt: bool = True,
        limit: int | None = None,
        think: bool | str | None = None,
    ) -> list[int]:
        """`chat_ids` in one of the two threads that this model's text may occupy."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, self.chat_ids, messages, tools, arguments, add_generation_prompt, limit, think
        )

    async def prompt_ids_async(self, text: str, limit: int | None = None) -> list[int]:
        """`tokenizer.encode_prompt`, in a thread when the text is long."""
        if len(text) <= _SHORT:
            return self.tokenizer.encode_prompt(text, limit=limit)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self.tokenizer.encode_prompt, text, False, limit)

    def close(self) -> None:
        """End the template's process and the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.template is not None:
            self.template.close()

    def _names(self) -> dict[str, object]:
        """The special tokens that templates call by name. Undefined names render as nothing."""
        tokenizer = self.tokenizer
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        return {name: tokenizer.token_bytes(i).decode() for name, i in ids.items() if i is not None}


def _fallback(tokenizer: Tokenizer) -> str | None:
    for token, template in FALLBACKS:
        if tokenizer.token_id(token) is not None:
            return template
    return None


def _folder_facts(path: Path, config: Mapping[str, object]) -> ModelFacts:
    inner = config.get("text_config")
    fields = {**config, **inner} if isinstance(inner, dict) else config

    def number(name: str) -> int:
        value = fields.get(name)
        return value if type(value) is int else 0

    folder = read_folder(path)
    stored = stored_tensors(folder, config)
    sizes: dict[int, int] = {}
    for tensor in stored.values():
        sizes[tensor.format] = sizes.get(tensor.format, 0) + tensor.nbytes
    kind = config.get("model_type")
    return ModelFacts(
        name=path.resolve().name,
        architecture=kind if isinstance(kind, str) else "unknown",
        parameters=sum(math.prod(tensor.shape) for tensor in stored.values()),
        quantization=FORMATS[max(sizes, key=lambda f: sizes[f])].name if sizes else "unknown",
        context_length=number("max_position_embeddings"),
        embedding_length=number("hidden_size"),
        file_bytes=sum(shard.nbytes for shard in folder.shards),
        license="",
    )


def _facts(file: GgufFile) -> ModelFacts:
    metadata = file.metadata
    architecture = metadata.get("general.architecture")
    architecture = architecture if isinstance(architecture, str) else "unknown"

    def number(key: str) -> int:
        value = metadata.get(key)
        return value if type(value) is int else 0

    def text(key: str, default: str) -> str:
        value = metadata.get(key)
        return value[:200] if isinstance(value, str) else default

    sizes: dict[int, int] = {}
    for tensor in file.tensors.values():
        sizes[tensor.format] = sizes.get(tensor.format, 0) + tensor.nbytes
    main_format = max(sizes, key=lambda f: sizes[f]) if sizes else 0
    file_type = metadata.get("general.file_type")
    known = _FILE_TYPES.get(file_type) if type(file_type) is int else None
    return ModelFacts(
        name=text("general.name", Path(file.path).stem),
        architecture=architecture,
        parameters=sum(math.prod(tensor.shape) for tensor in file.tensors.values()),
        quantization=known or FORMATS[main_format].name,
        context_length=number(f"{architecture}.context_length"),
        embedding_length=number(f"{architecture}.embedding_length"),
        file_bytes=sum(shard.nbytes for shard in file.shards),
        license=text("general.license", ""),
    )
