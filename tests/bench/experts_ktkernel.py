"""The same layer on PyPI's kt-kernel: a worker of experts.py (see WorkerSide in server/bench/sides.py).

experts_ktkernel.py int4|int8|bf16 HIDDEN FFN EXPERTS TOP THREADS

What kt-kernel loads on a CPU without AVX-512 has no int4 and int8 kernels of its own: its llamafile ones take
Q4_0 and Q8_0 in their place.
"""

import json
import sys
import time

import kt_kernel
import numpy as np
import torch
from kt_kernel_ext import CPUInfer, WorkerPoolConfig, moe
from kt_kernel_ext.kvcache import ggml_type

MOST_TOKENS = 512
LEAST_FORWARDS = 2


def random_blocks(count: int, quant_bytes: int) -> torch.Tensor:
    """Blocks of 32 weights: a float16 scale and so many bytes of integers."""
    blocks = np.empty(count, dtype=[("scale", "<f2"), ("quants", "u1", (quant_bytes,))])
    blocks["scale"] = 0.001
    blocks["quants"] = np.random.default_rng(1).integers(0, 256, (count, quant_bytes), dtype=np.uint8)
    return torch.from_numpy(blocks.view(np.uint8))


class Layer:
    """Random weights: BF16, which kt-kernel quantises by itself, or blocks for its llamafile kernels."""

    def __init__(self, kind: str, hidden: int, ffn: int, experts: int, top: int, threads: int) -> None:
        self.hidden, self.experts, self.top = hidden, experts, top
        pool = WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
        self.cpu = CPUInfer(pool)
        on_gpu = torch.zeros(experts, dtype=torch.bool)
        config = moe.MOEConfig(experts, top, hidden, ffn, on_gpu.data_ptr())
        config.max_len, config.pool = MOST_TOKENS, self.cpu.backend_
        sizes = ((experts, ffn, hidden), (experts, ffn, hidden), (experts, hidden, ffn))
        if kind == "bf16" or hasattr(moe, "AMXInt8_MOE"):
            self.weights = [torch.randn(size, dtype=torch.bfloat16) * 0.02 for size in sizes]
            self.layer = self._own(config, kind, experts)
        else:
            quant_bytes = 16 if kind == "int4" else 32
            self.weights = [random_blocks(experts * ffn * hidden // 32, quant_bytes) for _ in sizes]
            self.layer = self._llamafile(config, ggml_type.Q4_0 if kind == "int4" else ggml_type.Q8_0)
        order = torch.arange(experts, dtype=torch.int64)
        self.cpu.submit(self.layer.load_weights_task(order.data_ptr()))
        self.cpu.sync()
        del self.weights  # it has copies

    def _own(self, config: moe.MOEConfig, kind: str, experts: int) -> moe.MoE_Interface:
        if kind == "bf16":  # wants a pointer for each expert
            config.gate_projs, config.up_projs, config.down_projs = (
                [[w[e].data_ptr() for e in range(experts)]] for w in self.weights
            )
            return (moe.AMXBF16_MOE if hasattr(moe, "AMXBF16_MOE") else moe.AVX2BF16_MOE)(config)
        config.gate_proj, config.up_proj, config.down_proj = (w.data_ptr() for w in self.weights)
        return (moe.AMXInt4_MOE if kind == "int4" else moe.AMXInt8_MOE)(config)

    def _llamafile(self, config: moe.MOEConfig, quantised: ggml_type) -> moe.MoE_Interface:
        config.gate_proj, config.up_proj, config.down_proj = (w.data_ptr() for w in self.weights)
        config.gate_type = config.up_type = config.down_type = quantised
        config.hidden_type = ggml_type.BF16
        # As its own wrapper has it.
        config.m_block, config.group_min_len, config.group_max_len = 32, 10, MOST_TOKENS
        return moe.MOE(config)

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
