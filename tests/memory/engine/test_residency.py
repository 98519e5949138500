"""What is fetched ahead, let go, cancelled and counted, call by call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hasten.memory.engine.residency import Ledger, Residency
from hasten.memory.engine.weights import Unit
from tests.memory.simulated import Device

SIZE = 40


class Net:
    """Units by letter, one network's residency, and the units that are announced to be left out or undecided."""

    def __init__(self, letters: str = "abcde", *, ahead: int = 1) -> None:
        self.units = {letter: Unit(letter, [nn.Parameter(torch.randn(10))]) for letter in letters}
        self.device, self.ledger = Device(), Ledger()
        self.left_out, self.undecided = set[str](), set[str]()
        self.residency = Residency(self.device, self.ledger, ahead=ahead, forecast=self.forecast)

    def forecast(self, unit: Unit) -> bool | None:
        return None if unit.name in self.undecided else unit.name not in self.left_out

    def call(self, letters: str) -> None:
        for letter in letters:
            self.use(letter)
        self.residency.finish()

    def use(self, letter: str) -> None:
        unit = self.units[letter]
        self.residency.enter(unit)
        assert unit.present is not None
        assert unit.weights[0].tensor.data_ptr() == unit.present[0].data_ptr()
        self.residency.leave(unit)

    def brought(self) -> str:
        homes = {unit.weights[0].home.data_ptr(): name for name, unit in self.units.items()}
        found = "".join(homes[address] for address in self.device.log)
        self.device.log.clear()
        return found


def test_the_order_is_learned_and_then_fetched_ahead() -> None:
    net = Net()
    net.call("abcde")
    assert (net.brought(), net.ledger.ahead) == ("abcde", 0)
    net.residency.enter(net.units["a"])
    assert net.brought() == "ab", "the next one is on its way while the first is used"
    net.residency.leave(net.units["a"])
    for letter in "bcde":
        net.use(letter)
    net.residency.finish()
    assert net.brought() == "cde"
    assert (net.ledger.ahead, net.ledger.in_vain) == (4, 0)


@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
def test_no_more_is_there_than_what_is_used_and_fetched_ahead(ahead: int) -> None:
    net = Net(ahead=ahead)
    for _ in range(3):
        net.call("abcde")
    assert net.device.most == net.ledger.most == SIZE * (1 + ahead)
    assert net.device.present == net.ledger.present == 0


def test_what_is_announced_to_be_left_out_is_passed_over() -> None:
    net = Net(ahead=2)
    net.call("abcde")
    net.brought()
    net.left_out = set("bd")
    net.call("ace")
    assert net.brought() == "ace"
    assert net.ledger.in_vain == 0
    net.left_out = set()
    net.call("abcde")
    assert net.brought() == "abcde", "what was left out once is still expected"
    assert net.ledger.ahead == 2 + 4


def test_nothing_beyond_an_open_decision_is_fetched() -> None:
    net = Net()
    net.call("abcde")
    net.brought()
    net.undecided = set("bcde")
    net.residency.enter(net.units["a"])
    assert net.brought() == "a"
    net.undecided = set()
    net.residency.leave(net.units["a"])
    net.call("bcde")
    assert net.brought() == "bcde"
    assert net.ledger.in_vain == 0


def test_another_way_through_the_network_costs_a_copy_once() -> None:
    net = Net()
    net.call("abcde")
    net.call("acde")
    assert net.ledger.in_vain == SIZE, "b was on its way"
    net.call("acde")
    assert net.ledger.in_vain == SIZE
    net.call("abcde")
    net.call("abcde")
    assert net.ledger.in_vain <= 2 * SIZE
    assert net.ledger.present == net.device.present == 0


def test_a_unit_that_comes_twice() -> None:
    net = Net("abc")
    net.call("abca")
    net.brought()
    net.call("abca")
    assert net.brought() == "abca"
    assert net.ledger.in_vain == 0
    assert net.ledger.ahead == 3


def test_the_order_does_not_grow_without_end() -> None:
    net = Net("abc")
    for letters in ("abc", "cba", "bac") * 20:
        net.call(letters)
    assert len(net.residency._order) <= 9


def test_a_unit_in_use_stays() -> None:
    net = Net("abc", ahead=0)
    outer = net.units["a"]
    net.residency.enter(outer)
    net.use("b")
    net.use("c")
    assert outer.present is not None
    net.residency.enter(outer)
    net.residency.leave(outer)
    net.use("b")
    assert outer.present is not None
    net.residency.leave(outer)
    net.use("c")
    assert outer.present is None


def test_held_until_dropped() -> None:
    net = Net("ab", ahead=0)
    held = net.units["a"]
    held.lasting = True
    net.residency.hold(held)
    net.residency.hold(held)
    net.call("b")
    assert held.present is not None
    net.residency.drop(held)
    assert held.present is None
    assert held.uses == 0
    net.residency.drop(held)
    assert net.ledger.present == net.device.present == 0


def test_nothing_to_hold_is_no_load() -> None:
    net = Net("a")
    net.residency.hold(Unit("empty", []))
    assert (net.ledger.loads, net.device.copies) == (0, 0)


def test_a_copy_that_fails_leaves_the_unit_at_home() -> None:
    net = Net("ab")
    net.call("ab")
    begin = net.device.begin

    def fail(sources: object) -> object:
        raise torch.OutOfMemoryError

    net.device.begin = fail  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(torch.OutOfMemoryError):
        net.use("a")
    assert net.units["a"].uses == 0
    assert net.units["a"].present is None
    net.device.begin = begin  # pyright: ignore[reportAttributeAccessIssue]
    net.call("ab")
    assert net.ledger.present == net.device.present == 0


def test_other_data_put_in_place_of_a_weight_are_taken_over() -> None:
    """As when a LoRA is merged: at home, or while the weight is on the device."""
    net = Net("a", ahead=0)
    weight = net.units["a"].weights[0].tensor
    weight.data = torch.full((10,), 3.0)
    net.call("a")
    assert torch.equal(weight, torch.full((10,), 3.0))
    net.residency.enter(net.units["a"])
    weight.data = torch.full((10,), 4.0, dtype=torch.float64)
    net.residency.leave(net.units["a"])
    net.residency.finish()
    assert torch.equal(weight, torch.full((10,), 4.0, dtype=torch.float64))
    net.call("a")
    net.units["a"].restore()
    assert torch.equal(weight, torch.full((10,), 4.0, dtype=torch.float64))
    assert net.ledger.present == 0
    assert net.ledger.moved == net.device.bytes == 2 * SIZE + 80


def test_what_is_written_into_the_copy_comes_home() -> None:
    net = Net("a", ahead=0)
    weight = net.units["a"].weights[0].tensor
    before = weight.detach().clone()
    net.residency.enter(net.units["a"])
    with torch.no_grad():
        weight.add_(1)
    net.residency.leave(net.units["a"])
    net.residency.finish()
    assert torch.equal(weight, before + 1)
