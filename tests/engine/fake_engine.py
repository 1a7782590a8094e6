"""An engine without a model, and a script that serves it: `python fake_engine.py CONFIG.json`.

The fake keeps tokens where a real executor keeps KV, reads each sequence back through its block table, and
draws a hash of it. So a wrong block, position, chunk or prefix changes every later token, as it would with
a model.

Of the configuration it reads model: "fake[:seconds of loading[:seconds a step]]".
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from ktransformers.engine.__main__ import run
from ktransformers.engine.batch import F32, MAX_LOGPROBS, U8, Batch, Drawn, SamplingBatch
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.disk_tier import open_disk
from ktransformers.engine.runner import Limits
from ktransformers.engine.service import Engine
from ktransformers.kvcache.stores.memory import HostBlocks

FINGERPRINT = b"fake" * 8
POISON = 666
"""A token whose sequence makes the executor raise."""
NOT_FINITE = 667
"""A token whose sequence has no finite logits."""


class FakeExecutor:
    isa = "fake"
    weights_digest = (1,)
    state_slots = 0
    urgent_tokens = 32

    def __init__(self, blocks: int, block_tokens: int, vocab: int = 1000, seconds: float = 0.0) -> None:
        self.blocks, self.block_tokens, self.vocab = blocks, block_tokens, vocab
        self.seconds = seconds
        self.block_bytes = 8 * block_tokens
        self.kv = np.full((blocks, block_tokens), -1, np.int64)
        self.batches: list[tuple[Batch, SamplingBatch]] = []

    def step(
        self, batch: Batch, sampling: SamplingBatch, between: Callable[[], None] | None = None
    ) -> Drawn:
        drawn = self._step(batch, sampling)
        if between is not None:
            between()
        return drawn

    def urgent_step(self, batch: Batch, sampling: SamplingBatch) -> Drawn:
        return self._step(batch, sampling)

    def _step(self, batch: Batch, sampling: SamplingBatch) -> Drawn:
        self.batches = [*self.batches[-20:], (batch, sampling)]
        if self.seconds:
            time.sleep(self.seconds)
        drawn = {}
        for s in range(len(batch.starts) - 1):
            begin, end = batch.starts[s], batch.starts[s + 1]
            table = batch.blocks[batch.block_starts[s] : batch.block_starts[s + 1]]
            until = batch.context[s] + end - begin
            assert len(table) == -(-until // self.block_tokens)
            for t in range(begin, end):
                block, offset = divmod(batch.context[s] + t - begin, self.block_tokens)
                self.kv[table[block], offset] = batch.tokens[t]
            seen = self.kv[table].reshape(-1)[:until]
            if POISON in seen:
                raise RuntimeError("poison")
            drawn[end - 1] = -1 if NOT_FINITE in seen else next_token(seen.tolist(), self.vocab)
        token = np.array([drawn[row] for row in batch.logit_rows.tolist()], np.int32)
        top = np.full((len(token), MAX_LOGPROBS), -1, np.int32)
        for row, n in enumerate(sampling.logprobs.tolist()):
            top[row, : max(n, 0)] = (token[row] + np.arange(max(n, 0))) % self.vocab
        return Drawn(token, np.full(len(token), -0.5, np.float32), top, np.full(top.shape, -1.5, np.float32))

    def logits(self, batch: Batch) -> F32:
        raise NotImplementedError

    def read_block(self, block: int, into: U8) -> None:
        into[:] = self.kv[block].view(np.uint8)

    def write_block(self, block: int, data: U8) -> None:
        self.kv[block] = data.view(np.int64)

    def copy_state(self, source: int, target: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def next_token(tokens: list[int], vocab: int = 1000) -> int:
    """What FakeExecutor draws after `tokens`; never a special one (below 600)."""
    state = 17
    for token in tokens:
        state = (state * 31 + int(token) + 1) % 1_000_003
    return state % min(vocab, 600)


def generate(prompt: list[int], n: int, vocab: int = 1000) -> list[int]:
    """`n` tokens after `prompt`."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(next_token(tokens, vocab))
    return tokens[len(prompt) :]


def load(config: EngineConfig, report: Callable[[int, int], None]) -> Engine:
    """A fake engine, after as many seconds as the model's name asks for."""
    kind, *seconds = config.model.split(":")
    load_seconds, step_seconds = (*map(float, seconds), 0.0, 0.0)[:2]
    if kind != "fake":
        raise ValueError(f"{config.model} is no model")
    for done in range(10):
        report(done, 10)
        time.sleep(load_seconds / 10)
    executor = FakeExecutor(256, config.cache.block_tokens, seconds=step_seconds)
    limits = Limits(
        blocks=256,
        block_tokens=config.cache.block_tokens,
        max_len=config.context or 1024,
        max_sequences=config.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        vocab=1000,
    )
    host_blocks = (config.cache.host_bytes or 0) // executor.block_bytes
    host = HostBlocks(host_blocks, executor.block_bytes) if host_blocks else None
    disk = open_disk(config.cache, FINGERPRINT, executor.block_bytes)
    return Engine(executor, limits, FINGERPRINT, host, disk)


if __name__ == "__main__":
    settings = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=EngineConfig)
    sys.exit(run(settings, lambda report: load(settings, report)))
