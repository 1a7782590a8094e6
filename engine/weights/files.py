"""Opening the files of a model: maps of regular files, and small JSON documents. They come from strangers."""

import json
import mmap
import os
import stat
from pathlib import Path
from typing import Final

MAX_DEPTH: Final = 32
"""Of arrays and objects in a document."""


class FolderError(ValueError):
    """A folder of a model in Hugging Face's layout that cannot be trusted. One line: file, field, what."""


def map_file(path: Path, error: type[ValueError]) -> mmap.mmap:
    """Map a regular file. O_NONBLOCK, because opening a FIFO would otherwise wait for a writer."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as e:
        raise error(f"{path}: cannot be opened: {getattr(e, 'strerror', None) or e}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{path}: not a regular file")
        if status.st_size == 0:
            raise error(f"{path}: the file is empty")
        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(fd)


def inside(folder: Path, name: str) -> Path:
    """The path of a file of a model's folder. FolderError when it, or what it links to, lies elsewhere.

    In the cache of huggingface_hub a folder `snapshots/<revision>` links to its files in `blobs`.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise FolderError(f"{folder}: {name[:80]!a} is not the name of a file in this folder")
    path = folder / name
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as e:
        raise FolderError(f"{folder}: {name[:80]!a} cannot be opened: {e}") from None
    allowed = {root}
    if root.parent.name == "snapshots":
        allowed.add(root.parent.parent / "blobs")
    if real.parent not in allowed:
        raise FolderError(f"{folder}: {name[:80]!a} is a link to outside of this folder")
    return path


def read_text(folder: Path, name: str, limit: int) -> str | None:
    """A UTF-8 file of at most `limit` bytes; None when there is none of that name. FolderError."""
    path = inside(folder, name)
    if not path.exists():
        return None
    data = map_file(path, FolderError)
    if len(data) > limit:
        raise FolderError(f"{path}: {len(data)} bytes, more than {limit}")
    try:
        return data[:].decode()
    except UnicodeDecodeError as e:
        raise FolderError(f"{path}: not UTF-8 at byte {e.start}") from None


def read_json(folder: Path, name: str, limit: int) -> dict[str, object] | None:
    """A JSON object in which no key is repeated; None when there is no such file. FolderError."""
    text = read_text(folder, name, limit)
    return None if text is None else parse_object(text, str(folder / name))


def parse_object(text: str, where: str) -> dict[str, object]:
    """A JSON object, not deeper than MAX_DEPTH, in which no key is repeated. FolderError begins with
    `where`."""

    def no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            again = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise FolderError(f"{where}: key {again[:80]!a} appears twice")
        return found

    try:
        document = json.loads(text, object_pairs_hook=no_repeats)
    except FolderError:
        raise
    except RecursionError:
        raise FolderError(f"{where}: nested too deeply") from None
    except ValueError as e:
        raise FolderError(f"{where}: not JSON: {str(e)[:100]}") from None
    if not isinstance(document, dict):
        raise FolderError(f"{where}: not a JSON object")
    if _depth(document) > MAX_DEPTH:
        raise FolderError(f"{where}: nested too deeply")
    return document


def _depth(document: object) -> int:
    """How deep objects and arrays lie in each other, found level by level."""
    level: list[object] = [document]
    depth = 0
    while level:
        depth += 1
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += [v for v in value.values() if isinstance(v, dict | list)]
            elif isinstance(value, list):
                inner += [v for v in value if isinstance(v, dict | list)]
        level = inner
    return depth
