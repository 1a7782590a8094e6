"""Opening the disk tier: where, how large, and what is said when there is none."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ktransformers.kvcache.config import CacheConfig
from ktransformers.kvcache.stores.disk import DiskStore
from ktransformers.kvcache.stores.store import StoreError

log = logging.getLogger(__name__)

SHARE: Final = 0.1
"""Of what is free on the filesystem, and of what the tier has already, by itself."""
MOST: Final = 16 << 30
"""Bytes that the tier takes by itself."""


def open_disk(cache: CacheConfig, fingerprint: bytes, block_bytes: int) -> DiskStore | None:
    """None when it is switched off, or when it cannot be had: that costs speed, and nothing else."""
    if not cache.cache_dir or cache.disk_bytes == 0 or not cache.prefix_reuse:
        return None
    folder = Path(cache.cache_dir)
    try:
        size = cache.disk_bytes if cache.disk_bytes is not None else own_size(folder)
        return DiskStore.open(folder, fingerprint, block_bytes, size)
    except (StoreError, OSError) as error:
        log.warning("the prefix cache has no disk tier: %s", error)
        return None


def own_size(folder: Path) -> int:
    """Bytes that a tier in `folder`, which need not be there yet, takes when nobody says how many.

    The same after a restart as before, although it has filled some of the disk meanwhile. Errors: OSError.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    found = os.statvfs(there)
    free = found.f_bavail * found.f_frsize
    return min(int((free + sum(_sizes(folder))) * SHARE), MOST)


def _sizes(folder: Path) -> Iterator[int]:
    """What the files under `folder` take on disk."""
    for path, _, names in os.walk(folder):
        for name in names:
            yield os.lstat(os.path.join(path, name)).st_blocks * 512
