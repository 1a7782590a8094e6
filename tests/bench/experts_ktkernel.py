"""The same layer on PyPI's kt-kernel: milliseconds of the best forward by tokens, as JSON on the last line.

experts_ktkernel.py int4|int8|bf16 HIDDEN FFN EXPERTS TOP THREADS TOKENS,TOKENS (run by experts.py)
"""

import json
import sys
import time

import kt_kernel
import torch
from kt_kernel_ext import CPUInfer, WorkerPoolConfig, moe


def main() -> None:
    """Random BF16 weights, which kt-kernel quantises by itself; tokens choose evenly at random."""
    kind = sys.argv[1]
    hidden, ffn, experts, top, threads = map(int, sys.argv[2:7])
    pool = WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [threads]
    cpu = CPUInfer(pool)
    sizes = ((experts, ffn, hidden), (experts, ffn, hidden), (experts, hidden, ffn))
    gate, up, down = (torch.randn(size, dtype=torch.bfloat16) * 0.02 for size in sizes)
    on_gpu = torch.zeros(experts, dtype=torch.bool)
    config = moe.MOEConfig(experts, top, hidden, ffn, on_gpu.data_ptr())
    config.max_len, config.pool = 512, cpu.backend_
    if kind == "bf16":  # wants a pointer for each expert
        config.gate_projs, config.up_projs, config.down_projs = (
            [[w[e].data_ptr() for e in range(experts)]] for w in (gate, up, down)
        )
        layer = moe.AMXBF16_MOE(config)
    else:
        config.gate_proj, config.up_proj, config.down_proj = (w.data_ptr() for w in (gate, up, down))
        layer = (moe.AMXInt4_MOE if kind == "int4" else moe.AMXInt8_MOE)(config)
    order = torch.arange(experts, dtype=torch.int64)
    cpu.submit(layer.load_weights_task(order.data_ptr()))
    cpu.sync()
    best: dict[int, float] = {}
    for n in map(int, sys.argv[7].split(",")):
        x = torch.randn((n, hidden), dtype=torch.bfloat16)
        out = torch.empty_like(x)
        count = torch.tensor([n], dtype=torch.int32)
        begin, best[n] = time.perf_counter(), float("inf")
        while time.perf_counter() - begin < 1.0:
            ids = torch.stack([torch.randperm(experts)[:top] for _ in range(n)])
            weights = torch.rand((n, top), dtype=torch.float32)
            start = time.perf_counter()
            pointers = (t.data_ptr() for t in (ids, weights, x, out))
            cpu.submit(layer.forward_task(count.data_ptr(), top, *pointers, False))
            cpu.sync()
            best[n] = min(best[n], (time.perf_counter() - start) * 1e3)
        if not (torch.isfinite(out.float()).all() and out.float().abs().max() > 0):
            raise SystemExit("kt-kernel computed nothing")
    print(kt_kernel.__cpu_variant__, file=sys.stderr)
    print(json.dumps(best))


main()
