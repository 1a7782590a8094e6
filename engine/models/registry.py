"""From the metadata of a GGUF file to a ModelSpec. A new architecture is one function in families/.

Every `<architecture>.*` key is used or refused: a key that is not understood may change the mathematics.
"""

from collections.abc import Callable, Mapping
from typing import Final

from ktransformers.engine.models.families import (
    deepseek,
    gemma,
    glm,
    gpt_oss,
    llama,
    llama4,
    olmoe,
    qwen,
    smallthinker,
)
from ktransformers.engine.models.fields import brief
from ktransformers.engine.models.keys import Keys
from ktransformers.engine.models.spec import ModelError, ModelSpec
from ktransformers.engine.weights.gguf import Value

ARCHITECTURES: Final[dict[str, Callable[[Keys], ModelSpec]]] = {
    "llama": llama.llama,
    "qwen2": qwen.qwen2,
    "qwen2moe": qwen.qwen2moe,
    "qwen3": qwen.qwen3,
    "qwen3moe": qwen.qwen3moe,
    "qwen3next": qwen.qwen3next,
    "olmoe": olmoe.olmoe,
    "deepseek2": deepseek.deepseek2,
    "glm4moe": glm.glm4moe,
    "gpt-oss": gpt_oss.gpt_oss,
    "llama4": llama4.llama4,
    "smallthinker": smallthinker.smallthinker,
    "gemma": gemma.gemma,
    "gemma2": gemma.gemma2,
    "gemma3": gemma.gemma3,
}


def read_spec(metadata: Mapping[str, Value]) -> ModelSpec:
    """The spec of the model in a file. ModelError names the key that is missing, wrong or not supported."""
    kind = metadata.get("general.type", "model")
    if not isinstance(kind, str) or kind != "model":
        raise ModelError(f"key 'general.type': {brief(kind)} is not a model")
    name = metadata.get("general.architecture")
    build = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if build is None or not isinstance(name, str):
        supported = ", ".join(sorted(ARCHITECTURES))
        what = f"{brief(name)} is not supported; supported are {supported}"
        raise ModelError(f"key 'general.architecture': {what}")
    keys = Keys(name, metadata)
    spec = build(keys)
    keys.finish()
    return spec
