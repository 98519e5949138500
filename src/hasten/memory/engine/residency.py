"""Which units of a network are on the device of execution: brought in for a call, fetched ahead, let go again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hasten.memory.engine.copies import Copies
from hasten.memory.engine.weights import Unit

Forecast = Callable[[Unit], "bool | None"]
"""Will a unit be needed in the present call? None while that is not decided."""


@dataclass
class Ledger:
    """What has really been moved, over all networks of a session; all sizes in bytes."""

    managed: int = 0
    """Size of all weights that come and go."""
    moved: int = 0
    loads: int = 0
    ahead: int = 0
    """Loads that were begun before the unit was needed."""
    in_vain: int = 0
    """Bytes fetched ahead and not used in the call."""
    present: int = 0
    most: int = 0
    """The largest amount on the device at one time."""

    def begun(self, unit: Unit) -> None:
        """Count a copy to the device."""
        self.loads += 1
        self.moved += unit.arriving
        self.present += unit.arriving
        self.most = max(self.most, self.present)

    def gone(self, unit: Unit) -> None:
        """Count memory let go."""
        self.present -= unit.arriving


class Residency:
    """The units of one network, in the order in which they are needed.

    A unit stays until another one is needed, or the call of the network ends; the next ones in order are fetched
    ahead, as far as they are sure to be needed. The order is learned from the calls; a unit may come several times.
    """

    def __init__(self, copies: Copies, ledger: Ledger, *, ahead: int, forecast: Forecast) -> None:
        self.copies, self._ledger, self._ahead, self._forecast = copies, ledger, ahead, forecast
        self._order: list[Unit] = []
        self._place = -1
        """Where in the order the present call is."""
        self._idle: list[Unit] = []
        self._coming: list[Unit] = []
        self._held: set[int] = set()

    def enter(self, unit: Unit) -> None:
        """Have the unit on the device; until `leave` it stays there."""
        unit.uses += 1
        if unit.present is None:
            try:
                self._bring(unit)
            except BaseException:
                unit.uses -= 1
                raise

    def leave(self, unit: Unit) -> None:
        """The unit may go when another one comes."""
        unit.uses -= 1
        if not unit.uses:
            self._idle.append(unit)

    def hold(self, unit: Unit) -> None:
        """Have a unit on the device until `drop`."""
        if unit.weights and id(unit) not in self._held:
            self.enter(unit)
            self._held.add(id(unit))

    def drop(self, unit: Unit) -> None:
        """Let a unit go that was held."""
        if id(unit) in self._held:
            self._held.remove(id(unit))
            self.leave(unit)
        self._let_go(None)

    def finish(self) -> None:
        """At the end of the network's call: let everything go that is not in use."""
        self._let_go(None)
        for unit in self._coming:
            self._cancel(unit)
        self._coming, self._place = [], -1

    def _bring(self, unit: Unit) -> None:
        self._let_go(unit)
        if unit.arrival is None:
            self._begin(unit)
        else:
            self._coming.remove(unit)
            self._ledger.ahead += 1
        assert unit.arrival is not None
        arrival, unit.arrival = unit.arrival, None
        unit.install(arrival.wait())
        if not unit.lasting:
            self._note(unit)
            self._fetch_ahead()

    def _begin(self, unit: Unit) -> None:
        unit.arrival = self.copies.begin(unit.sources())
        self._ledger.begun(unit)

    def _let_go(self, needed: Unit | None) -> None:
        for unit in self._idle:
            if not unit.uses and unit.present is not None and unit is not needed:
                unit.withdraw()
                self._ledger.gone(unit)
        self._idle = []

    def _cancel(self, unit: Unit) -> None:
        """The network went another way: what was fetched is not used, and no longer expected there."""
        if unit.arrival is not None:
            unit.arrival.wait()
            unit.arrival = None
            self._ledger.in_vain += unit.arriving
            self._ledger.gone(unit)
        if (place := self._find(unit)) is not None:
            del self._order[place]

    def _find(self, unit: Unit) -> int | None:
        """The next place in the order where a unit is expected."""
        following = range(self._place + 1, len(self._order))
        return next((place for place in following if self._order[place] is unit), None)

    def _note(self, unit: Unit) -> None:
        here, place = self._place + 1, self._find(unit)
        if place is None:
            self._order.insert(here, unit)
        else:
            # What was passed over, and not because it is left out this time, is no longer expected here.
            self._order[here:place] = [one for one in self._order[here:place] if self._forecast(one) is not True]
        self._place = self._find(unit) or 0

    def _fetch_ahead(self) -> None:
        for following in self._following():
            if following.present is None and following.arrival is None:
                self._begin(following)
                self._coming.append(following)

    def _following(self) -> Iterator[Unit]:
        """The next units that are sure to be needed, up to where that is not decided."""
        left = self._ahead
        for following in self._order[self._place + 1 :]:
            expected = self._forecast(following)
            if not left or expected is None:
                return
            if expected:
                left -= 1
                yield following
