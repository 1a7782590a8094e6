"""The executor that the settings ask for, with its weights loaded."""

from collections.abc import Callable
from functools import partial

from ktransformers.engine.batch import Executor
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.models.spec import ModelError
from ktransformers.engine.plan import Plan
from ktransformers.engine.program import Program

Progress = Callable[[int, int], None]
"""Told bytes of weights done, and in total."""


def build_executor(config: EngineConfig, program: Program, plan: Plan, progress: Progress) -> Executor:
    """Load the weights. ModelError for settings that this executor cannot honour."""
    build = _native if config.torch_device is None else _torch
    try:
        return build(config, program, plan, progress)
    except ModelError:
        raise
    except ValueError as e:
        raise ModelError(f"{config.model}: the {config.executor} executor cannot run it: {e}") from e


def _native(config: EngineConfig, program: Program, plan: Plan, progress: Progress) -> Executor:
    from ktransformers.engine import _kernels
    from ktransformers.engine.executors.native import NativeExecutor

    if config.cache.block_tokens != _kernels.BLOCK_TOKENS:
        what = f"the native executor has blocks of {_kernels.BLOCK_TOKENS} tokens"
        raise ModelError(f"cache.block_tokens: {config.cache.block_tokens} is not supported; {what}")
    return NativeExecutor(
        program,
        threads=plan.threads,
        blocks=plan.blocks,
        max_tokens=config.max_batch_tokens,
        max_rows=config.max_sequences,
        expert_bytes=config.expert_bytes,
        kv_format=config.cache.kv_format,
        states=plan.states,
        progress=progress,
    )


def _torch(config: EngineConfig, program: Program, plan: Plan, progress: Progress) -> Executor:
    if config.cache.kv_format != "bf16":
        raise ModelError(f"cache.kv_format: only the native executor has {config.cache.kv_format!r}")
    if config.expert_bytes is not None:
        raise ModelError("expert_bytes: only the native executor can leave experts on disk")
    from ktransformers.engine.executors.hybrid import hybrid_executor
    from ktransformers.engine.executors.torch import TorchExecutor

    build: Callable[..., TorchExecutor] = TorchExecutor
    if plan.hybrid is not None:
        build = partial(hybrid_executor, placement=plan.hybrid.placement, records=plan.hybrid.records)
    return build(
        program,
        device=config.torch_device or "cpu",
        threads=plan.threads,
        blocks=plan.blocks,
        block_tokens=config.cache.block_tokens,
        max_tokens=config.max_batch_tokens,
        states=plan.states,
        progress=progress,
    )
