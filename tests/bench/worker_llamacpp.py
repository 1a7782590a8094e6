"""The peer's side of run.py: llama.cpp through the C interface of llama-cpp-python."""

import ctypes
import json
import sys
import time

import llama_cpp as lib

CONTEXT = 8192


def batch_of(rows: list[tuple[int, int, int, bool]]) -> "lib.llama_batch":
    """rows of (token, position, sequence, wants logits)"""
    batch = lib.llama_batch_init(len(rows), 0, 1)
    batch.n_tokens = len(rows)
    for i, (token, position, sequence, logits) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
        batch.seq_id[i][0], batch.logits[i] = sequence, logits
    return batch


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    silent = lib.llama_log_callback(lambda *_: None)  # kept: C calls it as long as we live
    lib.llama_log_set(silent, ctypes.c_void_p())
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, 512, 512, 32
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = threads
    context = lib.llama_init_from_model(model, params)
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    print(json.dumps({"engine": "llama.cpp", "package": lib.__version__}), flush=True)

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        batch = batch_of(rows)
        code = lib.llama_decode(context, batch)
        lib.llama_batch_free(batch)
        if code:
            raise SystemExit(f"llama_decode: {code}")
        lib.llama_synchronize(context)

    for line in sys.stdin:
        job = json.loads(line)
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        tokens = [(i * 7919 + 13) % (vocab - 1000) + 500 for i in range(4096)]
        if job["kind"] == "prefill":
            rows = [(tokens[i], i, 0, i == job["tokens"] - 1) for i in range(job["tokens"])]
            start = time.perf_counter()
            decode(rows)
            count = job["tokens"]
        else:
            streams = job["streams"]
            for s in range(streams):
                decode([(tokens[i + s], i, s, i == 15) for i in range(16)])
            start = time.perf_counter()
            for step in range(job["tokens"]):
                decode([(tokens[step * 17 + s], 16 + step, s, True) for s in range(streams)])
            count = streams * job["tokens"]
        print(json.dumps({"rate": count / (time.perf_counter() - start)}), flush=True)


if __name__ == "__main__":
    main()
