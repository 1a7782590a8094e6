"""The same layer on PyPI's kt-kernel: a worker of experts.py (see WorkerSide in server/bench/sides.py).

experts_ktkernel.py int4|int8|bf16 HIDDEN FFN EXPERTS TOP THREADS

What kt-kernel loads on a CPU without AVX-512 multiplies bf16, but has no int4 and int8 kernels that quantise.
"""

import json
import sys
import time

import kt_kernel
import torch
from kt_kernel_ext import CPUInfer, WorkerPoolConfig, moe

MOST_TOKENS = 512
LEAST_FORWARDS = 2


class Layer:
    """Random BF16 weights, which kt-kernel quantises by itself."""

    def __init__(self, kind: str, hidden: int, ffn: int, experts: int, top: int, threads: int) -> None:
        self.hidden, self.experts, self.top = hidden, experts, top
        pool = WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self.cpu = CPUInfer(pool)
        sizes = ((experts, ffn, hidden), (experts, ffn, hidden), (experts, hidden, ffn))
        gate, up, down = (torch.randn(size, dtype=torch.bfloat16) * 0.02 for size in sizes)
        # Read by its address in every forward, where experts that it marks are skipped.
        self.on_gpu = torch.zeros(experts, dtype=torch.bool)
        config = moe.MOEConfig(experts, top, hidden, ffn, self.on_gpu.data_ptr())
        config.max_len, config.pool = MOST_TOKENS, self.cpu.backend_
        if kind == "bf16":  # wants a pointer for each expert
            config.gate_projs, config.up_projs, config.down_projs = (
                [[w[e].data_ptr() for e in range(experts)]] for w in (gate, up, down)
            )
            own = "AMXBF16_MOE" if hasattr(moe, "AMXBF16_MOE") else "AVX2BF16_MOE"
            self.layer = getattr(moe, own)(config)
        elif not hasattr(moe, "AMXInt8_MOE"):
            raise SystemExit(
                f"kt-kernel's {kt_kernel.__cpu_variant__} has no {kind}; it has bf16: --formats BF16"
            )
        else:
            config.gate_proj, config.up_proj, config.down_proj = (w.data_ptr() for w in (gate, up, down))
            self.layer = (moe.AMXInt4_MOE if kind == "int4" else moe.AMXInt8_MOE)(config)
        order = torch.arange(experts, dtype=torch.int64)
        self.cpu.submit(self.layer.load_weights_task(order.data_ptr()))
        self.cpu.sync()

    def best(self, tokens: int, seconds: float) -> float:
        """Seconds of the best forward of `tokens` that choose evenly at random, other ones each time."""
        x = torch.randn((tokens, self.hidden), dtype=torch.bfloat16)
        out = torch.empty_like(x)
        count = torch.tensor([tokens], dtype=torch.int32)
        best, done, begin = float("inf"), 0, time.perf_counter()
        while done < LEAST_FORWARDS or time.perf_counter() - begin < seconds:
            ids = torch.stack([torch.randperm(self.experts)[: self.top] for _ in range(tokens)])
            weights = torch.rand((tokens, self.top), dtype=torch.float32)
            pointers = [t.data_ptr() for t in (ids, weights, x, out)]
            start = time.perf_counter()
            self.cpu.submit(self.layer.forward_task(count.data_ptr(), self.top, *pointers, False))
            self.cpu.sync()
            best, done = min(best, time.perf_counter() - start), done + 1
        if not (torch.isfinite(out.float()).all() and out.float().abs().max() > 0):
            raise SystemExit("kt-kernel computed nothing")
        return best


def main() -> None:
    layer = Layer(sys.argv[1], *map(int, sys.argv[2:7]))
    print(json.dumps({"engine": f"kt-kernel ({kt_kernel.__cpu_variant__})"}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps({"rate": job["tokens"] / layer.best(job["tokens"], job["seconds"])}), flush=True)


main()
