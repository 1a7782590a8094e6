"""Requests without a scheduler around them."""

from ktransformers.engine.protocol import Sampling
from ktransformers.kvcache.manager import KVCache
from ktransformers.scheduler.protocol import Tenant
from ktransformers.scheduler.request import Request

CACHE = KVCache(64, 16, b"", False)


def request(n, tenant="t", user="", prompt=10, outputs=10, **terms):
    return Request(
        id=f"r{n}",
        peer=b"",
        tenant=Tenant(tenant, user=user, **terms),
        tokens=[1] * prompt,
        n_prompt=prompt,
        sampling=Sampling(max_tokens=outputs),
        scope=b"",
        table=CACHE.open(b""),
        order=n,
        submitted=0.0,
    )
