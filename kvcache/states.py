"""Copies of sequences' states, for models whose sequences have one beside their KV.

A block of such a model is worth nothing without the state after it, and a state is as large as the KV of
many blocks. So copies are few: each is of the state after one block that is known on the device, and goes
with it. Where all places are taken, the owner with most by its weight gives the copy that it used least
recently.
"""

from ktransformers.kvcache.blocks import Owner
from ktransformers.kvcache.index import Entry


class KeptStates:
    """Places 0 .. total - 1: free, being written by a step that was planned, or of an entry.

    Steps read and write in the order of their planning, so a place may be given to a new copy while an
    older step has still to read it.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._written: set[int] = set()
        self._kept: dict[int, Entry] = {}
        """The one that was used least recently comes first."""

    @property
    def kept(self) -> int:
        """Places that a sequence may begin with."""
        return len(self._kept)

    @property
    def written(self) -> int:
        """Places that steps under way write to."""
        return len(self._written)

    def take(self) -> int:
        """A place for a step to write to; -1 when all are being written."""
        if not self._free:
            victim = self._victim()
            if victim is None:
                return -1
            self.drop(victim)
        place = self._free.pop()
        self._written.add(place)
        return place

    def keep(self, place: int, entry: Entry) -> None:
        """The step is done: the place has the state after this entry's block."""
        self._written.remove(place)
        if entry.state >= 0:
            self._free.append(place)  # it is known already, and the bits are the same
            return
        entry.state = place
        self._kept[place] = entry

    def give_back(self, place: int) -> None:
        """What the step wrote there is of no use."""
        self._written.remove(place)
        self._free.append(place)

    def use(self, entry: Entry) -> None:
        """A sequence begins with this one."""
        self._kept[entry.state] = self._kept.pop(entry.state)

    def drop(self, entry: Entry) -> None:
        """The entry's state, if it has one, is found no more."""
        if entry.state >= 0:
            del self._kept[entry.state]
            self._free.append(entry.state)
            entry.state = -1

    def _victim(self) -> Entry | None:
        most: dict[Owner, int] = {}
        for entry in self._kept.values():
            most[entry.owner] = most.get(entry.owner, 0) + 1
        if not most:
            return None
        owner = max(most, key=lambda o: most[o] / max(o.weight, 1e-3))
        return next(entry for entry in self._kept.values() if entry.owner is owner)

    def check(self, entries: list[Entry]) -> list[str]:
        """What is not as it should be."""
        places = sorted([*self._free, *self._written, *self._kept])
        held = {entry.state: entry for entry in entries if entry.state >= 0}
        problems = [] if places == list(range(self.total)) else ["places for states"]
        return problems if held == self._kept else [*problems, "states and entries"]
