"""Between the cache's moves of blocks and the engine's messages about them."""

from collections.abc import Iterable

from ktransformers.engine.protocol import BlockName, Move, Moved, Moves, Stored
from ktransformers.engine.protocol import Tier as TierName
from ktransformers.kvcache.blocks import Tier
from ktransformers.kvcache.manager import KVCache
from ktransformers.kvcache.moves import Traffic, Transfer
from ktransformers.scheduler.protocol import TierStatus

_NAMES: dict[Tier, TierName] = {Tier.DEVICE: "device", Tier.HOST: "host", Tier.DISK: "disk"}


def to_send(cache: KVCache, now: float) -> Moves | None:
    """What the engine is to be told about tiers, if anything."""
    transfers, forgotten = cache.send(now)
    if not transfers and not forgotten:
        return None
    return Moves([_move(transfer) for transfer in transfers], forgotten)


def take_moved(cache: KVCache, moves: Iterable[Moved], lost: Iterable[bytes]) -> None:
    """Moves have ended."""
    for moved in moves:
        cache.moves.finish(moved.id, moved.ok, moved.bytes, moved.seconds)
    for key in lost:
        cache.lost(key)


def take_stored(cache: KVCache, stored: Stored) -> None:
    """The disk says what it has."""
    for block in sorted(stored.blocks, key=lambda b: b.last_use):
        cache.stored(block.key, block.parent, block.owner, block.bytes, block.hits)


def status(cache: KVCache) -> list[TierStatus]:
    """Of the tiers that there are."""
    traffic = cache.moves.traffic
    told = []
    for tier, shelf in zip(Tier, cache.tiers.shelves, strict=True):
        up = traffic.get((tier, Tier.DEVICE), Traffic())
        down = [way for (_, target), way in traffic.items() if target is tier is not Tier.DEVICE]
        if not shelf.capacity and not up.moves:
            continue
        told.append(
            TierStatus(
                name=_NAMES[tier],
                bytes_total=shelf.capacity,
                bytes_used=shelf.used,
                hit_tokens=cache.hit_tokens[tier],
                evictions=shelf.evicted,
                loads=up.moves - up.failed,
                load_failures=up.failed,
                load_bytes=up.bytes,
                load_seconds=up.seconds,
                stores=sum(way.moves - way.failed for way in down),
                store_failures=sum(way.failed for way in down),
                store_bytes=sum(way.bytes for way in down),
                store_seconds=sum(way.seconds for way in down),
            )
        )
    return told


def _move(transfer: Transfer) -> Move:
    source, target, entry = transfer.source, transfer.target, transfer.entry
    name = None
    if Tier.DISK in (source.tier, target.tier) and entry.parent is not None:
        name = BlockName(entry.key, entry.parent, entry.owner.id, transfer.content)
    return Move(
        id=transfer.id,
        source=_NAMES[source.tier],
        source_block=source.block,
        target=_NAMES[target.tier],
        target_block=target.block,
        name=name,
    )
