"""serve_llamacpp.py MODEL THREADS SLOTS [CONTEXT [cache]]: llama.cpp's HTTP server, from PyPI's xllamacpp
(AVX2 only).

Prints "Ready: URL" and serves until its input ends. CONTEXT is that of one slot; "cache" lets a slot begin
with what it has of a prompt.
"""

import sys

import xllamacpp


def main() -> None:
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    threads, slots = int(sys.argv[2]), int(sys.argv[3])
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_parallel = slots
    params.n_ctx = slots * (int(sys.argv[4]) if len(sys.argv) > 4 else 512)
    params.cache_prompt = "cache" in sys.argv[5:]
    params.port = 0
    server = xllamacpp.Server(params)
    print(f"Ready: {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
