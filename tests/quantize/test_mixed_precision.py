"""Bits by layer: the budget holds, errors are least, and layers that matter are found without names."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from hasten.core.errors import HastenError, InvalidSetting
from hasten.quantize import MixedPrecision
from hasten.quantize.engine.gains_file import load_gains, save_gains
from hasten.quantize.engine.knapsack import Choice, choose
from hasten.quantize.engine.sites import Site
from hasten.quantize.engine.statistics import Running
from hasten.quantize.engine.watching import Statistics, WatchedLayer, key_of
from hasten.quantize.mixed_precision import places_alike


def best(layers: dict[str, list[Choice]], budget: float) -> float:
    """The least sum of errors, by trying everything."""
    fitting = [pick for pick in itertools.product(*layers.values()) if sum(c.size for c in pick) <= budget]
    return min(sum(c.error for c in pick) for pick in fitting)


@pytest.mark.parametrize("seed", range(8))
def test_choices_are_nearly_the_best_within_the_budget(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, list[Choice]] = {}
    for number in range(6):
        size, error = (10 ** float(torch.rand(1, generator=generator) * 2) for _ in range(2))
        layers[f"l{number}"] = [Choice(str(bits), bits * size, error * 4.0**-bits) for bits in (2, 3, 4, 8)]
    budget = 4.4 * sum(choices[0].size / 2 for choices in layers.values())
    found = choose(layers, budget)
    assert sum(choice.size for choice in found.values()) <= budget
    assert sum(choice.error for choice in found.values()) <= 1.35 * best(layers, budget)


def test_what_is_left_over_is_spent() -> None:
    layers = {"a": [Choice("2", 2, 10), Choice("3", 3, 9), Choice("8", 8, 0)]}
    assert choose(layers, 7.5)["a"].name == "3"  # not on the hull, but all that fits
    assert choose(layers, 8)["a"].name == "8"


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(HastenError, match="smallest choices take 2"):
        choose({"a": [Choice("2", 2, 1)]}, 1.5)


def layer(path: str, scale: float = 1.0) -> Site:
    parent = nn.Module()
    made = nn.Linear(64, 64)
    made.weight.data = torch.randn(64, 64, generator=torch.Generator().manual_seed(len(path))) * scale
    parent.add_module(path.rpartition(".")[2], made)
    return Site("transformer", path, parent, made)


def known_of(inputs: dict[str, torch.Tensor]) -> Statistics:
    found = {name: Running(64, torch.device("cpu")) for name in inputs}
    for name, x in inputs.items():
        found[name].add(x)
    layers = {name: WatchedLayer(name, 64) for name in inputs}
    return Statistics(layers, lambda name: found[name].sums().statistics())


def test_bits_go_where_the_error_is_and_where_it_matters() -> None:
    places = [layer("blocks.0.a"), layer("blocks.0.bb"), layer("proj_out")]
    x = torch.randn(200, 64)
    outlier = x.clone()
    # A channel that is hardly there has large weights, which make the steps of its group coarse for all others.
    outlier[:, 5] /= 30
    places[1].layer.weight.data[:, 5] *= 30
    known = known_of(dict(zip(map(key_of, places), (x, outlier, x), strict=True)))
    chosen = MixedPrecision(bits=5.0).chosen(places, known, {})
    assert int(chosen["transformer/blocks.0.bb"]) > int(chosen["transformer/blocks.0.a"])
    gains = {"transformer/proj_out": 1e4, "transformer/blocks.0.a": 1.0, "transformer/blocks.0.bb": 1.0}
    weighed = MixedPrecision(bits=5.0).chosen(places, known, gains)
    assert weighed["transformer/proj_out"] in ("8", "kept")
    assert weighed["transformer/blocks.0.a"] < chosen["transformer/blocks.0.a"]


@pytest.mark.parametrize("budget", [{"bits": 3.2}, {"bits": 6.0}, {"memory": "6KiB"}])
def test_the_budget_holds(budget: dict[str, float | str]) -> None:
    places = [layer("blocks.0.a"), layer("blocks.0.bb")]
    known = known_of({key_of(place): torch.randn(99, 64) for place in places})
    technique = MixedPrecision.build(budget)
    assert isinstance(technique, MixedPrecision)
    chosen = technique.chosen(places, known, {})
    modules = [technique._quantized(place, known.of(place), chosen[key_of(place)]) for place in places]
    if "memory" in budget:
        held = sum(b.nbytes for module in modules if module for b in module.buffers())
        assert 0.7 * 6 * 1024 < held <= 6 * 1024
    else:
        assert sum(int(bits) for bits in chosen.values()) <= 2 * float(budget["bits"])


def test_amounts_of_memory_are_read() -> None:
    assert MixedPrecision(memory="6 GB").memory == "6 GB"
    for wrong in ("6", "lots", "-1GB", "nanGB"):
        with pytest.raises(InvalidSetting, match="write it as 6GB"):
            MixedPrecision(memory=wrong)


def test_gains_are_of_one_model(tmp_path: Path) -> None:
    file = save_gains(tmp_path / "gains.json", {"transformer/a": 0.5}, {"weights_sha256": "ab"})
    assert load_gains(file, "ab") == {"transformer/a": 0.5}
    with pytest.raises(HastenError, match="other weights"):
        load_gains(file, "cd")
    file.write_text(file.read_text().replace("0.5", "-1"))
    with pytest.raises(HastenError, match="damaged"):
        load_gains(file, "ab")
    file.write_text("[]")
    with pytest.raises(HastenError, match="no sensitivities"):
        load_gains(file, "ab")


def test_layers_that_have_to_be_alike_share_what_they_get() -> None:
    places = [layer("blocks.0.a"), layer("blocks.1.a"), layer("proj_out")]
    places[1].layer.weight.data[:, 5] *= 30
    known = known_of({key_of(place): torch.randn(200, 64) for place in places})
    names = {key_of(place): "Block.a" for place in places[:2]}
    gains = dict(zip(map(key_of, places), (1.0, 1.0, 1e3), strict=True))
    chosen = MixedPrecision(bits=4.0).chosen(places, known, gains, names)
    assert chosen["transformer/blocks.0.a"] == chosen["transformer/blocks.1.a"] != chosen["transformer/proj_out"]
    assert sum(16 if bits == "kept" else int(bits) for bits in chosen.values()) <= 12


def test_places_alike_are_those_of_blocks_that_repeat() -> None:
    from hasten.core.target import Target
    from tests.contract.rigs import make

    target = Target.of(make("flux"))
    found = MixedPrecision().takes(target)
    names = places_alike(target, found)
    first, second = (names[f"transformer/transformer_blocks.{n}.ff.net.2"] for n in (0, 1))
    assert first == second != names["transformer/transformer_blocks.0.ff_context.net.2"]
    assert "transformer/proj_out" not in names
