"""From a model's file or folder to a program, and what tells one model from another."""

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ktransformers.engine import machine
from ktransformers.engine.batch import Executor
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.models.decoder import compile_program
from ktransformers.engine.models.folder import FolderModel, open_folder
from ktransformers.engine.models.registry import read_spec
from ktransformers.engine.models.spec import ModelError, ModelSpec
from ktransformers.engine.program import Program
from ktransformers.engine.requantise import Errors, requantise
from ktransformers.engine.weights.gguf import GgufFile, read
from ktransformers.engine.weights.safetensors import Folder


@dataclass(frozen=True)
class Facts:
    """What is known of a model before it is loaded."""

    name: str
    """general.name, or the name of the file or folder."""
    spec: ModelSpec
    weight_bytes: int
    """Of the tensors that the program reads, in the formats that they are loaded in."""
    identity: bytes
    """What its files say it is, without the weights' contents."""
    requantised: Errors | None
    """What experts lose to expert_format, known once they are loaded."""


def open_model(config: EngineConfig) -> tuple[Program, Facts]:
    """Read and check a model's file, or its folder in Hugging Face's layout; takes milliseconds, as weights
    are only mapped.

    GgufError and FolderError for broken files, ModelError for a model that is not supported; all name the
    file.
    """
    path = Path(config.model)
    file: GgufFile | FolderModel
    files: GgufFile | Folder
    try:
        if path.is_dir():
            file = open_folder(path)
            spec, files, name = file.spec, file.folder, path.resolve().name
        else:
            file = files = read(path)
            spec, name = read_spec(file.metadata), _general_name(file)
        program, requantised = requantise(
            compile_program(spec, file), config.expert_format, config.threads or machine.cpus()
        )
    except ModelError as e:
        raise ModelError(f"{config.model}: {e}") from None
    facts = Facts(
        name=name,
        spec=spec,
        weight_bytes=sum(w.data.nbytes for w in program.weights),
        identity=identity(files),
        requantised=requantised,
    )
    return program, facts


def _general_name(file: GgufFile) -> str:
    name = file.metadata.get("general.name")
    return name if isinstance(name, str) and name else file.path.stem


def identity(file: GgufFile | Folder) -> bytes:
    """SHA-256 of the header and size of each file: configuration, tokenizer, names and shapes."""
    digest = hashlib.sha256()
    for shard, header in zip(file.shards, file.header_bytes, strict=True):
        digest.update(len(shard).to_bytes(8, "little"))
        digest.update(shard[:header].data)
    return digest.digest()


def fingerprint(config: EngineConfig, program: Program, facts: Facts, executor: Executor) -> bytes:
    """SHA-256 of everything that changes the bytes of KV; see engine.protocol.Ready.

    What the model is, what it was compiled to and the contents of all its weights; the KV's format and
    blocks; and the code that computes it: two instruction sets, or two builds, need not agree to the last
    bit, and a hit has to.
    Weights are digested once they are in memory, which takes a small part of the time of loading them: a few
    samples would not tell a model from its fine-tune when that has changed some of its tensors only.
    """
    digest = hashlib.sha256()
    for part in (
        facts.identity,
        repr(program.ops).encode(),
        repr(executor.weights_digest).encode(),
        f"{executor.isa} {executor.block_tokens} {executor.block_bytes}".encode(),
        _build(config),
    ):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _build(config: EngineConfig) -> bytes:
    """Names the code that computes KV."""
    torch = f"torch {version('torch')}".encode() if config.torch_device is not None else b""
    if torch and not config.placement:
        return torch
    from ktransformers.engine import _kernels

    return torch + hashlib.sha256(Path(_kernels.__file__).read_bytes()).digest()
