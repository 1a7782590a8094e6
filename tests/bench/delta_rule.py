"""The gated delta rule and its convolution at Qwen3-Next's shape, one layer: seconds a step and a token.

    PYTHONPATH=build/ns python tests/bench/delta_rule.py [THREADS]

Prints a table in a few seconds. The state's traffic counts each token's read and write of all heads, most of
which a step of many tokens finds in the first cache.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "engine"))

from small_programs import executor
from test_recurrence import Shape, batch, program_of, tokens_of, weights_of

SHAPE = Shape(k_heads=16, v_heads=32, k_dim=128, v_dim=128)
STEPS = {1: 400, 16: 40, 128: 8, 512: 4}
"""Tokens of a step, and how often it is done."""


def main() -> None:
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    program = program_of(SHAPE, weights_of(SHAPE))
    ex = executor(program, threads=threads, states=1, max_tokens=512, max_rows=512)
    elements = SHAPE.v_heads * SHAPE.k_dim * SHAPE.v_dim
    print(f"{ex.isa}, {threads} threads; microseconds of one layer")
    heads = ("tokens", "conv a step", "rule a step", "rule a token", "state GB/s", "GFLOP/s")
    print("".join(f"{head:>14}" for head in heads))
    for tokens, times in STEPS.items():
        step = batch((tokens_of(tokens), 64, 0))
        step.logit_rows.resize(1, refcheck=False)
        ex.logits(step)
        ex.set_profiling(True)
        for _ in range(times):
            ex.logits(step)
        profile = zip(program.ops, ex.profile(), strict=False)
        seconds = {type(op).__name__: s / times for op, (_, s) in profile}
        ex.set_profiling(False)
        conv, rule = seconds["ShortConv"], seconds["DeltaRule"]
        rates = (8 * elements * tokens / rule / 1e9, 7 * elements * tokens / rule / 1e9)
        print(
            f"{tokens:>14}{conv * 1e6:>14,.0f}{rule * 1e6:>14,.0f}{rule / tokens * 1e6:>14,.1f}"
            f"{rates[0]:>14,.0f}{rates[1]:>14,.0f}"
        )


if __name__ == "__main__":
    main()
