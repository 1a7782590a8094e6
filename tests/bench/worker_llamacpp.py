"""llama.cpp through the C interface of llama-cpp-python: a worker of run.py (see server/bench/sides.py)."""

import ctypes
import sys
import time

import llama_cpp as lib
from worker import answer_jobs

LONGEST = 4096
STEP_TOKENS = 512
ROUND = 64
"""As in engine/bench/loads.py."""


class Engine:
    """A context for each number of streams, each with KV of its own, as in llama-batched-bench."""

    def __init__(self, path: str, threads: int) -> None:
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.threads = threads
        self.context = None
        self.streams = 0
        self.filled = -1

    def open(self, streams: int, context: int) -> None:
        if self.streams == streams:
            return
        if self.context is not None:
            lib.llama_free(self.context)
        params = lib.llama_context_default_params()
        params.n_seq_max = streams
        params.n_ctx = streams * (max(LONGEST, context) if streams == 1 else context) + streams * ROUND
        params.n_batch = params.n_ubatch = STEP_TOKENS
        params.n_threads = params.n_threads_batch = self.threads
        self.context = lib.llama_init_from_model(self.model, params)
        self.memory = lib.llama_get_memory(self.context)
        self.streams, self.filled = streams, -1

    def token(self, i: int) -> int:
        return (i * 7919 + 13) % self.vocab

    def step(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """rows of (token, position, sequence, wants logits)"""
        batch = lib.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, logits
        code = lib.llama_decode(self.context, batch)
        lib.llama_batch_free(batch)
        if code:
            raise SystemExit(f"llama_decode: {code}")
        lib.llama_synchronize(self.context)

    def prompt(self, tokens: int) -> None:
        for begin in range(0, tokens, STEP_TOKENS):
            end = min(begin + STEP_TOKENS, tokens)
            self.step([(self.token(i), i, 0, i == tokens - 1) for i in range(begin, end)])

    def prefill(self, tokens: int, seconds: float) -> float:
        self.open(1, tokens)
        self.filled = -1
        begin, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - begin < seconds:
            lib.llama_memory_clear(self.memory, True)
            self.prompt(tokens)
            done += tokens
        return done / (time.perf_counter() - begin)

    def decode(self, streams: int, context: int, seconds: float) -> float:
        self.open(streams, context)
        if self.filled != context:
            lib.llama_memory_clear(self.memory, True)
            self.prompt(context)
            for s in range(1, streams):
                lib.llama_memory_seq_cp(self.memory, 0, s, -1, -1)  # a copy: nothing is shared
            self.filled = context
        begin, steps = time.perf_counter(), 0
        while steps < 4 or time.perf_counter() - begin < seconds:
            at = context + steps % ROUND
            if at == context:
                for s in range(streams):
                    lib.llama_memory_seq_rm(self.memory, s, context, -1)
            self.step([(self.token(steps * 17 + s), at, s, True) for s in range(streams)])
            steps += 1
        return steps * streams / (time.perf_counter() - begin)


def main() -> None:
    silent = lib.llama_log_callback(lambda *_: None)  # kept: C calls it as long as we live
    lib.llama_log_set(silent, ctypes.c_void_p())
    answer_jobs("llama.cpp", lib.__version__, Engine(sys.argv[1], int(sys.argv[2])))


if __name__ == "__main__":
    main()
