"""The heap whose entries say only how small a key is at least, against sorting by keys as they are."""

import random
from itertools import islice

import pytest

from ktransformers.scheduler.virtual_time import Claimant, Level


def key_and_order(orders):
    return lambda item: (item.key, orders[item])


@pytest.mark.parametrize("seed", range(20))
def test_the_order_is_that_of_keys_as_they_are(seed):
    """Charges and settled promises make keys grow behind the heap's back; who joins, leaves, or has a promise
    taken back is put in its place, as the fair queue does."""
    rng = random.Random(seed)
    level = Level(most_idle=0)
    everybody = [Claimant(str(i)) for i in range(30)]
    for item in everybody:
        item.weight = rng.choice([0.3, 1.0, 7.0])
    orders = {}
    for order in range(3000):
        item = rng.choice(everybody)
        match rng.randrange(5):
            case 0:
                level.ready.drop(item)
                orders.pop(item, None)
            case 1:
                item.pending = rng.choice([0, rng.randrange(10_000)])
                orders[item] = order
                level.ready.put(item, order)
            case _:
                cost = rng.randrange(1000)
                before = item.key
                item.charge(cost)
                item.pending -= min(item.pending, cost)
                assert item.key >= before
        expected = sorted(orders, key=key_and_order(orders))
        assert level.ready.least() is (expected[0] if expected else None)
        most = rng.randrange(1, 12)
        assert list(islice(level.ready.in_order(), most)) == expected[:most]
        assert len(level.ready) == len(orders)
