"""What clients may know about the served model."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ktransformers.server.text.model import TextModel

_NOT_IN_NAMES = re.compile(r"[^a-z0-9._-]+")


@dataclass(frozen=True)
class ModelCard:
    """What clients may know about the model."""

    name: str
    created: int
    """Unix time of the file."""
    size: int
    """Bytes."""
    digest: str
    """Tells versions of the file apart (64 hex digits); not a hash of its content, which would take seconds
    to read."""
    family: str = ""
    parameter_size: str = ""
    quantization: str = "unknown"
    license: str = ""
    template: str = ""
    info: Mapping[str, str | int] = field(default_factory=dict)
    """By the names of GGUF metadata."""
    container: str = "gguf"
    """What holds it: "gguf", or "safetensors" for a folder in Hugging Face's layout."""

    @property
    def modified_at(self) -> str:
        """`created` as RFC 3339."""
        return datetime.fromtimestamp(self.created, UTC).isoformat().replace("+00:00", "Z")


def model_card(path: Path, name: str, text: TextModel) -> ModelCard:
    """The card of the file or folder that `text` was read from; `name` "" is made of its name."""
    stat = path.stat()
    identity = f"{path.name}\0{text.facts.file_bytes}\0{stat.st_mtime_ns}"
    facts = text.facts
    return ModelCard(
        name=name or _NOT_IN_NAMES.sub("-", path.stem.lower()).strip("-.") or "model",
        created=int(stat.st_mtime),
        size=facts.file_bytes,
        digest=hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest(),
        family=facts.architecture,
        parameter_size=facts.parameter_size,
        quantization=facts.quantization,
        container="safetensors" if path.is_dir() else "gguf",
        license=facts.license,
        template=text.template.source if text.template is not None else "",
        info={
            "general.architecture": facts.architecture,
            "general.name": facts.name,
            "general.parameter_count": facts.parameters,
            f"{facts.architecture}.context_length": facts.context_length,
            f"{facts.architecture}.embedding_length": facts.embedding_length,
        },
    )
