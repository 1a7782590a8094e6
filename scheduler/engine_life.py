"""One life of the engine, from Ready to its end: its blocks, its slots, and what is under way."""

from collections import deque

from ktransformers.engine.protocol import Ready
from ktransformers.kvcache.blocks import BlockTable
from ktransformers.kvcache.manager import KVCache
from ktransformers.scheduler.admission import Limits
from ktransformers.scheduler.config import SchedulerConfig
from ktransformers.scheduler.entrance import Entrance
from ktransformers.scheduler.fair_queue import FairQueue
from ktransformers.scheduler.growth import OutputEstimate
from ktransformers.scheduler.planner import Plan, Planner
from ktransformers.scheduler.protocol import Tenant
from ktransformers.scheduler.stats import Counters, Pace
from ktransformers.scheduler.step_time import Chunking, StepTime
from ktransformers.scheduler.watchdog import Watchdog


class EngineLife:
    """It is kept when it ends, for its limits, until the next one begins."""

    def __init__(
        self,
        ready: Ready,
        config: SchedulerConfig,
        queue: FairQueue,
        estimate: OutputEstimate,
        counters: Counters,
        pace: Pace,
    ) -> None:
        self.alive = True
        self.ready = ready
        self.limits = Limits(min(ready.max_len, ready.blocks * ready.block_tokens), ready.vocab)
        self.step_time = StepTime()
        self.cache = KVCache(
            ready.blocks,
            ready.block_tokens,
            ready.fingerprint,
            config.engine.cache.prefix_reuse,
            block_bytes=ready.block_bytes,
            host_blocks=ready.host_blocks,
            disk_bytes=ready.disk_bytes,
            kept_states=ready.kept_states,
            recompute=self.step_time.prompt_seconds,
        )
        self.watchdog = Watchdog(pace, self.cache.moves.oldest_sent)
        slots = ready.max_sequences
        entrance = Entrance(self.cache, queue, estimate, counters, pace, slots)
        self.planner = Planner(
            self.cache,
            queue,
            entrance,
            self.step_time,
            Chunking(self.step_time, config.tbt_slo),
            estimate,
            counters,
            slots,
            ready.max_batch_tokens,
        )
        self.in_flight: deque[Plan] = deque()
        self.began = 0.0
        """When it began with the oldest of them, as far as is known."""
        self.plan_at: float | None = None
        """When to plan the next one, if that was put off."""

    def open_table(self, scope: bytes, tenant: Tenant) -> BlockTable:
        """An empty one for a request of this tenant."""
        return self.cache.open(scope, self.cache.owner(tenant.id, tenant.weight, tenant.kv_bytes))
