"""Places for states: whose goes first when they run out."""

from ktransformers.kvcache.blocks import Owner
from ktransformers.kvcache.index import Entry
from ktransformers.kvcache.states import KeptStates


def entry(owner: Owner, n: int) -> Entry:
    return Entry(bytes([n]), None, None, owner)


def test_the_owner_with_most_by_weight_gives_what_it_used_least_recently():
    few, many = Owner(b"few"), Owner(b"many", weight=2.0)
    states = KeptStates(5)
    entries = [entry(owner, i) for i, owner in enumerate((few, many, many, many, many))]
    for e in entries:
        states.keep(states.take(), e)
    states.use(entries[1])
    states.keep(states.take(), entry(few, 5))
    assert [e.state >= 0 for e in entries] == [True, True, False, True, True]
    # Now `few` has two, and 2 / 1 is more than 3 / 2: it gives its own.
    states.take()
    assert [e.state >= 0 for e in entries] == [False, True, False, True, True]


def test_places_that_are_being_written_are_given_to_nobody():
    states = KeptStates(2)
    first, second = states.take(), states.take()
    assert {first, second} == {0, 1}
    assert states.take() == -1
    known = entry(Owner(b"o"), 1)
    states.keep(first, known)
    states.keep(second, known)  # the same, computed twice
    assert known.state == first
    assert states.take() == second
    assert states.take() == first
    assert known.state == -1
    states.give_back(first)
    assert (states.kept, states.written) == (0, 1)
    assert states.check([known]) == []
