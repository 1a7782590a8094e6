"""What the balance between tenants is set to."""

from dataclasses import dataclass, field

from ktransformers.scheduler.charges import Prices
from ktransformers.scheduler.config import SchedulerConfig


@dataclass(frozen=True)
class Rules:
    """The settings of the fair queue; SchedulerConfig says what each is for."""

    window: float = 2.0
    backfill: float = 2.0
    preempt: float = 10.0
    kv_share: float = 1.25
    predict: bool = True
    fresh_first: bool = True
    """Who is light and has no backlog goes first, and others do not make it wait for long steps."""
    by_arrival: bool = False
    """First come, first served: the counters are kept, and nobody looks at them."""
    prices: Prices = field(default_factory=Prices)

    @classmethod
    def of(cls, config: SchedulerConfig) -> "Rules":
        """As the scheduler is configured."""
        if config.policy != "fair":
            by_arrival = config.policy == "fifo"
            return cls(0.0, 0.0, 0.0, 0.0, predict=False, fresh_first=False, by_arrival=by_arrival)
        return cls(
            window=config.fair_window,
            backfill=config.fair_window,
            preempt=config.fair_preempt,
        )
