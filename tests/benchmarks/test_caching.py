"""The caching benchmark: budgets are met, work is counted, intervals are right, prompts do not overlap."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from hasten.core.files import read_json

FOLDER = Path(__file__).parents[2] / "benchmarks" / "caching"


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    """Imports a module of the benchmark, whose scripts import each other by bare name."""
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.skip = nn.Linear(4, 8), nn.Linear(8, 2), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        return hidden if self.skip else self.second(hidden)


def test_work_is_what_the_layers_really_multiplied(load: Any) -> None:
    net, work = _Net(), load("counting").Work()
    with work.watching(net):
        net(torch.zeros(3, 4))
        net.skip = True
        net(torch.zeros(3, 4))
    net(torch.zeros(3, 4))
    assert work.take() == [3 * 4 * 8 + 3 * 8 * 2, 3 * 4 * 8]
    assert work.take() == []


def test_full_partial_and_left_out_steps_are_told_apart(load: Any) -> None:
    found = load("counting").summary([[100, 40, 100], [100, 100]], 100, 4)
    assert found == {"full_steps": 2, "partial_steps": 0.5, "left_out_steps": 1.5, "work": (2.4 + 2) / 8}


@pytest.mark.parametrize("steps", [28, 50])
@pytest.mark.parametrize("fraction", [2, 3, 4, 5])
def test_static_peers_meet_the_budget(load: Any, steps: int, fraction: int) -> None:
    budget, peers, methods = steps // fraction, load("peers"), load("methods")
    mask = peers.step_mask(steps, budget)
    assert (len(mask), sum(mask), mask[0], mask[-1]) == (steps, budget, 1, 1)
    values = methods.nearest(peers.taylor_steps, steps, budget)
    full = {tuple(sorted(v.items())): n for v, n in peers.taylor_steps(steps)}[tuple(sorted(values.items()))]
    assert abs(full - budget) <= 1


def test_bisection_finds_the_threshold_and_reuses_what_it_knows(load: Any) -> None:
    tried: list[float] = []

    def count(threshold: float) -> float:
        tried.append(threshold)
        return 28 / (1 + threshold)

    crossing = load("searching").crossing
    found = crossing(count, 7, 1e-4, 8.0, {8.0: 28 / 9})
    assert abs(28 / (1 + found) - 7) <= 0.3
    tried.clear()
    assert crossing(count, 7, 1e-4, 8.0, {8.0: 28 / 9, found: 28 / (1 + found)}) == pytest.approx(found, rel=1e-5)
    assert not tried


def test_intervals_hold_the_mean_and_shrink_for_paired_differences(load: Any) -> None:
    bootstrap = load("bootstrap")
    generator = torch.Generator().manual_seed(0)
    prompts = (30 + 8 * torch.randn(32, generator=generator)).tolist()
    better = [value + 1 for value in prompts]
    one, paired = bootstrap.estimate(prompts), bootstrap.difference(better, prompts)
    assert one.low < 30 < one.high
    assert one.high - one.low == pytest.approx(4 * 8 / 32**0.5, rel=0.35)
    assert paired.mean == pytest.approx(1)
    assert paired.high - paired.low < 1e-6
    assert bootstrap.estimate(prompts) == one


def test_prompts_are_those_that_the_script_draws_and_do_not_overlap(load: Any) -> None:
    models = cast("dict[str, Any]", read_json(FOLDER / "prompts.json"))["models"]
    script = load("make_prompts")
    for name, lists in models.items():
        calibration, evaluation = lists["calibration"], lists["evaluation"]
        assert (len(calibration), len(evaluation)) == (8, 32)
        assert len({text.split(",")[0] for text, _ in calibration + evaluation}) == 40
        assert len({seed for _, seed in calibration + evaluation}) == 40
        if name == "emoji-dit":
            assert [text for text, _ in calibration + evaluation] == [word for word, _ in script.drawn()]


def test_a_failing_or_dying_row_is_a_sentence(load: Any) -> None:
    isolation = load("isolation")
    assert isolation.isolated(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(isolation.RowFailed, match="KeyError: 'peer'"):
        isolation.isolated(lambda: {}["peer"])
    with pytest.raises(isolation.RowFailed, match="exit code 3"):
        isolation.isolated(lambda: __import__("os")._exit(3))


def test_a_recipe_text_becomes_a_row(load: Any) -> None:
    ours, methods = load("ours"), load("methods")
    method = ours.method_of("every third", "FORA(interval={interval})")
    assert methods.nearest(method.tune, 28, 9) == {"interval": 3}
    assert ours.filled(method.detail, methods.Setting(28, 9, {"interval": 3})) == "FORA(interval=3)"
    assert not ours.known("NoSuchCache(interval={interval})")
    with pytest.raises(SystemExit, match="needs one of"):
        ours.method_of("nothing to turn", "FORA()")


def test_rows_are_kept_as_they_finish_and_never_mixed_with_others(load: Any, tmp_path: Path) -> None:
    results = load("run").Results
    header = {"weights": "a", "guidance": 3.0, "prompts": 32, "environment": {"device": "this"}}
    results.open(tmp_path / "x.json", header).add("row @ 1/2", {"name": "row", "status": "ok"})
    again = results.open(tmp_path / "x.json", header)
    assert again.has("row @ 1/2")
    again.forget("row")
    assert not again.has("row @ 1/2")
    for other in ({"weights": "b"}, {"guidance": 2.0}, {"prompts": 2}, {"environment": {"device": "that"}}):
        with pytest.raises(SystemExit, match=f"other {next(iter(other)).replace('environment', 'device')}"):
            results.open(tmp_path / "x.json", header | other)


def test_pictures_come_back_as_they_were(load: Any, tmp_path: Path) -> None:
    references = load("references")
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for exact, tolerance in ((True, 0.0), (False, 0.5 / 255 + 1e-6)):
        (tmp_path / "kept.npz").write_bytes(references.Pictures(images, exact).to_bytes())
        assert (references.read_pictures(tmp_path / "kept") - images).abs().max() <= tolerance
    assert references.read_pictures(tmp_path / "none") is None
