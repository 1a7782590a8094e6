"""Settings of the KV cache."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

KvFormat = Literal["bf16", "int8"]


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much KV there may be, and in what pieces.

    A block is `block_tokens` consecutive positions of one sequence, all layers, keys and values. It is the
    unit of allocation, of prefix reuse and, by position, of the attention kernel's order of summation.
    """

    block_tokens: Annotated[int, Meta(ge=1, le=1024)] = 16
    """No setting: the native executor has blocks of 16 only, and results depend on it."""
    device_bytes: Annotated[int, Meta(ge=1, le=1 << 60)] | None = None
    """Bytes of the device pool; None takes a share of the memory that is free once the weights are loaded."""
    host_bytes: Annotated[int, Meta(ge=0, le=1 << 60)] | None = None
    """Bytes of the host pool, which keeps what the device pool has no room for; 0 is none. None is none where
    the device pool lies in the same memory, and a share of what is free where the device has its own."""
    disk_bytes: Annotated[int, Meta(ge=0, le=1 << 60)] | None = None
    """Bytes that the disk tier may take, in which prefixes outlive a restart; 0 is none. None is a tenth of
    what is free on the disk, 16 GiB at most."""
    cache_dir: str = ""
    """Folder of the disk tier; "" is `kv` in the user's cache folder."""
    kv_format: KvFormat = "bf16"
    """int8 holds nearly twice the tokens in the same memory, each token's keys and values of a head with a
    scale of their own, and costs some fidelity. Only the native executor has it."""
    prefix_reuse: bool = True
