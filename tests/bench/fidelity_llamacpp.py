"""fidelity_llamacpp.py MODEL THREADS TOKENS.npy LOGITS.npy: llama.cpp's logits of every position."""

import ctypes
import sys

import llama_cpp as lib
import numpy as np
from worker_llamacpp import STEP_TOKENS, Engine


def main() -> None:
    silent = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(silent, ctypes.c_void_p())
    engine = Engine(sys.argv[1], int(sys.argv[2]))
    tokens = np.load(sys.argv[3]).tolist()
    engine.open(1, len(tokens))
    logits = np.lib.format.open_memmap(sys.argv[4], "w+", np.float32, (len(tokens), engine.vocab))
    for begin in range(0, len(tokens), STEP_TOKENS):
        part = tokens[begin : begin + STEP_TOKENS]
        engine.step([(token, begin + i, 0, True) for i, token in enumerate(part)])
        for i in range(len(part)):
            row = lib.llama_get_logits_ith(engine.context, i)
            logits[begin + i] = np.ctypeslib.as_array(row, (engine.vocab,))
    logits.flush()


if __name__ == "__main__":
    main()
