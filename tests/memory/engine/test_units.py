"""Networks are cut so that every weight belongs to one unit, and each module knows the units it needs."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from hasten.core.away import take_away, taken_away
from hasten.core.target import Target
from hasten.memory.engine.components import is_compiled
from hasten.memory.engine.units import Cut, Kind, block_lists, cut
from hasten.memory.engine.weights import all_tensors, dense, like, size_of
from tests.contract.rigs import ARCHITECTURES, make


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(5)])
        self.leave = nn.Linear(4, 4)
        self.leave.weight = self.enter.weight
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))


@pytest.mark.parametrize("kind", ["model", "blocks", "leaf"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_is_in_one_unit(kind: Kind, architecture: str) -> None:
    target = Target.of(make(architecture))
    for name, module in target.modules.items():
        units = cut(target, name, kind, 2).units
        tensors = [id(weight.tensor) for unit in units for weight in unit.weights]
        assert sorted(tensors) == sorted(id(tensor) for tensor in all_tensors(module))
        assert sum(unit.bytes for unit in units) == size_of(module)


@pytest.mark.parametrize(("group", "names"), [(1, "01234"), (2, "024"), (3, "03"), (9, "0")])
def test_groups(group: int, names: str) -> None:
    found = Cut("net", Net(), "blocks", group=group)
    assert [unit.name for unit in found.passing] == [f"net.blocks.{name}" for name in names]
    assert sum(len(unit.modules) for unit in found.passing) == 5
    assert found.rest.bytes == 4 * (16 + 4 + 4 + 4 + 4)  # a weight shared by two linears, their biases, scale, mean


def test_a_shared_weight_belongs_to_who_comes_first_and_is_known_to_both() -> None:
    net = Net()
    found = Cut("net", net, "leaf")
    owners = {id(module): units for module, units in found.owners()}
    assert [unit.name for unit in owners[id(net.enter)]] == ["net.enter"]
    assert [unit.name for unit in owners[id(net.leave)]] == ["net.enter", "net.leave"]


def test_fused_attention_is_one_leaf() -> None:
    """Its code reads the weights of its output projection without calling it."""
    net = nn.Module()
    net.attention = nn.MultiheadAttention(8, 2)
    [unit] = Cut("net", net, "leaf").passing
    assert unit.bytes == size_of(net)


def test_a_unet_is_cut_inside_its_stages() -> None:
    target = Target.of(make("stable_diffusion"))
    names = [unit.name for unit in cut(target, "unet", "blocks", 1).passing]
    assert all(name.count(".") >= 3 for name in names if "_blocks" in name)
    assert [name for name in names if name.startswith("unet.down_blocks.0.")]
    assert len(names) > len(list(block_lists(target.modules["unet"])))


@pytest.mark.parametrize("kind", ["blocks", "leaf"])
def test_lists_with_empty_places(kind: Kind) -> None:
    """A VAE without attention has a list of None."""
    net = Net()
    net.blocks[0] = nn.Sequential()
    empty: dict[str, nn.Module | None] = net.blocks._modules  # pyright: ignore[reportAssignmentType]
    empty["1"] = None
    found = Cut("net", net, kind)
    assert sum(unit.bytes for unit in found.units) == size_of(net)
    assert [module for module, _ in found.pieces() if module is net.blocks[4]]


def test_a_vae_is_not_cut_in_blocks() -> None:
    target = Target.of(make("flux"))
    assert not cut(target, "vae", "blocks", 1).passing
    assert cut(target, "vae", "leaf", 1).passing


def test_weights_taken_care_of_are_left_out_and_come_back() -> None:
    net = Net()
    tensors = list(net.blocks[0].parameters())
    end = take_away(net, tensors)
    again = take_away(net, [net.scale])
    assert Cut("net", net, "blocks", group=1).passing[0].name == "net.blocks.1"
    end()
    assert [id(tensor) for tensor in taken_away(net)] == [id(net.scale)]
    again()
    assert Cut("net", net, "blocks", group=1).passing[0].name == "net.blocks.0"
    end()


def test_nothing_is_remembered_of_a_network_that_is_gone() -> None:
    from hasten.core import away

    net = Net()
    take_away(net, net.parameters())
    before = len(away._AWAY)
    del net
    gc.collect()
    assert len(away._AWAY) <= before


def test_pieces_name_what_may_be_compiled() -> None:
    net = Net()
    pieces = {id(module): units for module, units in Cut("net", net, "blocks", group=2).pieces()}
    assert [unit.name for unit in pieces[id(net.blocks[3])]] == ["net.blocks.2"]
    assert not is_compiled(net.blocks[3])
    net.blocks[3].compile(backend="eager")
    assert is_compiled(net.blocks[3])


def test_new_memory_has_the_same_layout() -> None:
    for tensor in (torch.randn(4, 6).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)):
        assert dense(tensor)
        assert like(tensor, torch.device("cpu")).stride() == tensor.stride()
    assert not dense(torch.randn(4, 6)[:, ::2])
    assert not dense(torch.randn(1, 6).expand(4, 6))
    assert dense(torch.empty(0, 3))
    assert like(torch.randn(1, 6).expand(4, 6), torch.device("cpu")).shape == (4, 6)
