"""The ledger: every verb takes itself back exactly, in reverse, and a failure loses nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hasten.core.clock import Clock
from hasten.core.errors import PatchError
from hasten.core.patch import Change, Patch, summarize


def new(*named: tuple[object, str]) -> Patch:
    return Patch({id(obj): name for obj, name in named}, Clock)


def plus(amount: float) -> Any:
    return lambda call, *args, **kwargs: call(*args, **kwargs) + amount


def test_around_and_outermost() -> None:
    linear, given = nn.Linear(2, 2), torch.ones(1, 2)
    plain, patch = linear(given), new((linear, "model.linear"))
    patch.outermost(linear, lambda call, x: call(x) * 2, "is doubled")
    patch.around(linear, plus(1.0), "is raised")
    assert torch.equal(linear(given), (plain + 1.0) * 2)
    assert patch.log == [Change("model.linear", "is doubled"), Change("model.linear", "is raised")]
    patch.close()
    assert type(linear) is nn.Linear
    assert torch.equal(linear(given), plain)


@pytest.mark.parametrize("before", [None, 1])
def test_set_brings_back_what_was_there(before: int | None) -> None:
    linear = nn.Linear(2, 2)
    if before is not None:
        linear.extra = before  # pyright: ignore
    patch, attributes = new(), dict(vars(linear))
    patch.set(linear, "extra", 2, "has an extra")
    patch.set(linear, "extra", 3, "has another")
    assert vars(linear)["extra"] == 3
    patch.close()
    assert vars(linear) == attributes


def test_set_shadows_a_class_attribute_only_on_the_instance() -> None:
    linear = nn.Linear(2, 2)
    patch = new()
    patch.set(linear, "extra_repr", str, "prints differently")
    patch.close()
    assert "extra_repr" not in vars(linear)


def test_swap_brings_back_the_very_module() -> None:
    parent = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    original, patch = parent[0], new((parent, "net"))
    patch.swap(parent, "0", nn.Identity(), "is left out")
    assert isinstance(parent[0], nn.Identity)
    assert patch.log == [Change("net", "0: is left out")]
    patch.close()
    assert parent[0] is original
    assert [*parent._modules] == ["0", "1"]


def test_swap_of_an_unknown_module() -> None:
    with pytest.raises(PatchError, match="Sequential has no sub-module '7'"):
        new().swap(nn.Sequential(), "7", nn.Identity(), "")


def test_restride_keeps_values_and_brings_back_strides() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(2, 2))
    transposed = nn.Parameter(torch.randn(3, 3, 4, 5).permute(3, 2, 0, 1))
    net[0].weight = transposed
    weights = list(net.parameters())
    before = [(id(weight), weight.stride(), weight.detach().clone()) for weight in weights]
    patch = new((net, "vae"))
    assert patch.restride(net, torch.channels_last, "is NHWC") == 1
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(weight, value) for weight, (_, _, value) in zip(weights, before, strict=True))
    assert patch.log == [Change("vae", "is NHWC (1 weights)")]
    patch.close()
    for weight, (identity, strides, value) in zip(net.parameters(), before, strict=True):
        assert (id(weight), weight.stride()) == (identity, strides)
        assert torch.equal(weight, value)


def test_restride_of_nothing_is_not_recorded() -> None:
    patch = new()
    assert patch.restride(nn.Linear(2, 2), torch.channels_last, "is NHWC") == 0
    assert not patch.log


def test_changes_are_undone_newest_first_and_once() -> None:
    undone: list[int] = []
    patch = new()
    for number in range(3):
        patch.undo(patch, "something", lambda number=number: undone.append(number))
    patch.close()
    patch.close()
    assert undone == [2, 1, 0]


def test_a_failing_undo_does_not_stop_the_others_and_is_tried_again() -> None:
    undone: list[str] = []
    blocked = [True]

    def stubborn() -> None:
        if blocked[0]:
            raise PatchError("not yet")
        undone.append("stubborn")

    patch = new()
    patch.undo(patch, "first", lambda: undone.append("first"))
    patch.undo(patch, "stubborn", stubborn)
    patch.undo(patch, "last", lambda: undone.append("last"))
    for _ in range(2):
        with pytest.raises(PatchError, match="not yet"):
            patch.close()
        assert undone == ["last", "first"]
    blocked.clear()
    blocked.append(False)
    patch.close()
    assert undone == ["last", "first", "stubborn"]


def test_absorbed_changes_stay() -> None:
    linear, patch = nn.Linear(2, 2), new()
    patch.set(linear, "extra", 1, "has an extra")
    patch.absorb()
    patch.close()
    assert vars(linear)["extra"] == 1
    assert len(patch.log) == 1


def test_an_object_without_a_known_place_is_called_by_its_class() -> None:
    subject = SimpleNamespace()
    patch = new()
    patch.set(subject, "a", 1, "is set")
    assert patch.log == [Change("SimpleNamespace", "is set")]


def test_kept_states_come_back() -> None:
    patch, state = new(), object()
    assert patch.keep(state) is state
    assert patch.states == [state]


def test_a_summary_counts_equal_changes_of_one_component() -> None:
    changes = [Change("unet.a", "x"), Change("unet.b", "x"), Change("vae", "x"), Change("unet.a", "y")]
    assert summarize(changes) == ["unet: x (2 places, first unet.a)", "vae: x", "unet.a: y"]


def test_a_sub_module_is_added_and_goes_again() -> None:
    parent = nn.Sequential(nn.Linear(2, 2))
    patch = new()
    patch.add(parent, "extra", nn.Linear(2, 3), "is new")
    assert list(dict(parent.named_children())) == ["0", "extra"]
    with pytest.raises(PatchError, match="Sequential has 'extra' already"):
        patch.add(parent, "extra", nn.Linear(2, 3), "is new")
    patch.close()
    assert list(dict(parent.named_children())) == ["0"]


def test_an_original_comes_back_inside_an_adapter() -> None:
    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

    parent, replacement = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    original, patch = parent[0], new()
    patch.swap(parent, "0", replacement, "is replaced")
    parent[0] = adapter = Adapter(Adapter(replacement))
    patch.close()
    assert parent[0] is adapter
    assert adapter.base_layer.base_layer is original
