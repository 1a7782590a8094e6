"""Settings of one engine process."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from ktransformers.kvcache.config import CacheConfig


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model on one machine."""

    model: str
    """Path of a GGUF file, or of a folder in Hugging Face's layout."""
    executor: Annotated[
        str,
        Meta(
            pattern=r"\A(native|torch(:[a-z]+(:[0-9]{1,3})?)?)\Z",
            description="native, torch, or torch on a device, such as torch:cuda or torch:cuda:0",
        ),
    ] = "native"
    """native; torch, which is torch:cpu; or torch on another of its devices, as in torch:cuda:0."""
    threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    """Compute threads; None is one for each CPU this process may run on."""
    context: Annotated[int, Meta(ge=16, le=1 << 24)] | None = None
    """Longest sequence in tokens; None is what the model was trained for, capped by the KV pool."""
    max_batch_tokens: Annotated[int, Meta(ge=1, le=65536)] = 512
    """Most tokens that one step computes."""
    max_sequences: Annotated[int, Meta(ge=1, le=4096)] = 64
    """Slots: sequences that may hold KV at once."""
    expert_bytes: Annotated[int, Meta(ge=1)] | None = None
    """Memory for routed experts, which then stay in the model's file: those used last are kept, the others
    are read when they are chosen. None: all of them are in memory."""
    expert_format: Literal["as-is", "int8", "int4"] = "as-is"
    """Routed experts with more bits are made of so many when they are loaded; the error is measured and
    printed."""
    placement: str = ""
    """Which experts the torch executor has on its device, while csrc computes the others on the CPU: a TOML
    file of rules, or "auto". "": it has all of the model on its device."""
    cache: CacheConfig = CacheConfig()
    socket: str = ""
    """Path of the engine's unix socket; the supervisor fills it in."""

    @property
    def torch_device(self) -> str | None:
        """Name of the torch device; None: the native executor."""
        name, _, device = self.executor.partition(":")
        return (device or "cpu") if name == "torch" else None
