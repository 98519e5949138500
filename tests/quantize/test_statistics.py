"""Statistics of inputs: what they are, who shares them, and that files give them back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hasten.core.errors import HastenError
from hasten.kernels.hadamard import rotate
from hasten.quantize.engine.sites import Site
from hasten.quantize.engine.statistics import InputStatistics, Running, Sums, block_size, doubt, quadratic
from hasten.quantize.engine.statistics_file import StatisticsFile, save_statistics
from hasten.quantize.engine.watching import Watcher


def of(*parts: torch.Tensor) -> InputStatistics:
    """Statistics whose products of channels are trusted entirely."""
    running = Running(parts[0].shape[1], torch.device("cpu"))
    for part in parts:
        running.add(part)
    sums = running.sums()
    return InputStatistics(sums.counts[0], sums.absmax, sums.mean_abs, sums.halves[0])


def test_sums_over_parts_are_those_of_the_whole() -> None:
    x = torch.randn(50, 24)
    found = of(x[:13], x[13:])
    assert found.count == 50
    assert torch.equal(found.absmax, x.abs().amax(0))
    assert torch.allclose(found.mean_abs, x.abs().mean(0))
    assert torch.allclose(found.second, (x.T @ x / 50)[None], atol=1e-6)
    assert torch.allclose(found.power, x.square().mean(0))


def test_quadratic_is_the_error_of_real_outputs() -> None:
    x, change = torch.randn(40, 16), torch.randn(8, 16)
    assert torch.allclose(quadratic(change, of(x).second), (x @ change.T).square().mean(0), rtol=1e-4)


def test_many_inputs_keep_blocks_of_moments() -> None:
    assert [block_size(size) for size in (64, 4096, 12288, 15360, 8960)] == [64, 4096, 1024, 1024, 256]
    x, change = torch.randn(20, 5120), torch.randn(4, 5120)
    found = of(x)
    assert found.second.shape == (5, 1024, 1024)
    apart = sum((x[:, at : at + 1024] @ change[:, at : at + 1024].T).square().mean(0) for at in range(0, 5120, 1024))
    assert torch.allclose(quadratic(change, found.second), torch.as_tensor(apart), rtol=1e-3)


def test_divided_and_rotated_are_those_of_divided_and_rotated_inputs() -> None:
    x, smooth = torch.randn(60, 32) * torch.linspace(0.1, 5, 32), torch.rand(32) + 0.5
    assert torch.allclose(of(x).divided(smooth).second, of(x / smooth).second, atol=1e-5)
    assert torch.allclose(of(x).divided(smooth).absmax, of(x / smooth).absmax)
    turned = of(x).rotated(16)
    assert torch.allclose(turned.second, of(rotate(x, 16)).second, atol=1e-5)
    true = of(rotate(x, 16))
    assert (turned.mean_abs / true.mean_abs - 1).abs().max() < 0.3


def test_blocks_are_joined_for_wider_rotations() -> None:
    blocks = InputStatistics(9, torch.ones(8), torch.ones(8), torch.eye(2).repeat(4, 1, 1) * 3)
    assert torch.allclose(blocks.rotated(4).second, torch.eye(4).repeat(2, 1, 1) * 3, atol=1e-6)


def test_undefined_inputs_are_named() -> None:
    with pytest.raises(HastenError, match=r"net/0\.to_q was given infinite"):
        of(torch.tensor([[1.0, float("nan")]])).check("net/0.to_q")


class Attention(nn.Module):
    """Query and key from one tensor, value from another; it changes its mind when `apart` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 16, bias=False) for _ in range(3))
        self.apart = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.to_q(x) + self.to_k(x * 2 if self.apart else x) + self.to_v(x + 1)


def watched() -> tuple[Attention, list[Site], Watcher]:
    module = Attention()
    sites = [Site("net", f"0.{n}", module, layer) for n, layer in module.named_children()]  # pyright: ignore
    return module, sites, Watcher(sites)


def test_layers_with_one_input_share_statistics() -> None:
    module, sites, watcher = watched()
    x = torch.randn(5, 8)
    module(x)
    found = watcher.statistics()
    assert {name: layer.input for name, layer in found.layers.items()} == {
        "net/0.to_q": "net/0.to_q",
        "net/0.to_k": "net/0.to_q",
        "net/0.to_v": "net/0.to_v",
    }
    assert [[site.name for site in group] for group in found.groups(sites)] == [["to_q", "to_k"], ["to_v"]]
    assert torch.equal(found.of(sites[2]).absmax, (x + 1).abs().amax(0))


def test_layers_that_part_get_statistics_of_their_own() -> None:
    module, sites, watcher = watched()
    module(torch.randn(5, 8))
    module.apart = True
    module(x := torch.randn(7, 8))
    found = watcher.statistics()
    assert found.layers["net/0.to_k"].input == "net/0.to_k"
    assert torch.equal(found.of(sites[1]).absmax, 2 * x.abs().amax(0))


def test_nothing_is_seen_while_inactive_or_stopped() -> None:
    module, sites, watcher = watched()
    module(torch.randn(5, 8))
    watcher.active = False
    module(torch.randn(5, 8))
    watcher.active = True
    watcher.stop()
    module(torch.randn(5, 8))
    assert watcher.statistics().of(sites[0]).count == 5
    assert not module.to_q._forward_pre_hooks


def test_fused_projections_are_found_by_their_parts() -> None:
    module, _, watcher = watched()
    module(torch.randn(5, 8))
    found = watcher.statistics()
    fused = Site("net", "0.to_qk", module, nn.Linear(8, 32))
    assert found.find(fused) == "net/0.to_q"
    with pytest.raises(HastenError, match="has not been calibrated"):
        found.of(Site("net", "0.to_out", module, nn.Linear(8, 8)))


def test_files_give_back_what_was_written_and_go_on(tmp_path: Path) -> None:
    module, sites, watcher = watched()
    module(x := torch.randn(5, 8))
    file = save_statistics(tmp_path / "s.safetensors", watcher, {"weights_sha256": "ab"}, finished=False)
    opened = StatisticsFile(file)
    assert opened.weights == "ab"
    assert not opened.finished
    assert_same(opened.statistics.of(sites[1]), watcher.statistics().of(sites[1]))
    watcher.stop()
    second = Watcher(sites)
    second.resume(opened.statistics.layers, opened.sums)
    second.half = 1
    module(y := torch.randn(3, 8))
    sums = second.sums("net/0.to_q")
    assert sums.counts == (5, 3)
    assert torch.allclose(sums.halves[:, 0], torch.stack([x.T @ x / 5, y.T @ y / 3]), atol=1e-6)
    save_statistics(file, second, {})
    finished = StatisticsFile(file)
    assert_same(finished.statistics.of(sites[1]), second.statistics().of(sites[1]))
    assert list(tmp_path.iterdir()) == [file]


def assert_same(one: InputStatistics, other: InputStatistics) -> None:
    assert one.count == other.count
    assert torch.equal(one.second, other.second)
    assert torch.equal(one.absmax, other.absmax)
    assert torch.equal(one.mean_abs, other.mean_abs)


def halves(pictures: int, tokens: int = 40, inputs: int = 24) -> torch.Tensor:
    """The moments of two halves of pictures, each of which has a direction of its own beside a common mixing."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.logspace(0.5, -1, inputs)
    found = torch.zeros(2, 1, inputs, inputs)
    for picture in range(pictures):
        own = torch.randn(1, inputs, generator=generator) * 2
        x = torch.randn(tokens, inputs, generator=generator) @ mix.T + own
        found[picture % 2, 0] += x.T @ x / tokens / (pictures / 2)
    return found


def test_few_pictures_are_trusted_less_than_many() -> None:
    few, many = doubt(halves(4)), doubt(halves(400))
    assert few > 0.05
    assert many < 0.02


def test_doubt_leaves_the_diagonal_and_lessens_the_rest() -> None:
    sums = Sums((4, 4), torch.ones(24), torch.ones(24), halves(4))
    whole, found = sums.halves.mean(0)[0], sums.statistics().second[0]
    assert torch.allclose(found.diagonal(), whole.diagonal())
    kept = (found - torch.diag(found.diagonal())).norm() / (whole - torch.diag(whole.diagonal())).norm()
    assert float(kept) == pytest.approx(1 - doubt(halves(4)), rel=1e-4)


def test_doubt_makes_gptq_better_on_pictures_that_were_not_seen() -> None:
    from hasten.quantize.engine.gptq import gptq
    from hasten.quantize.engine.grids import grid_of

    seen, truth = halves(4), halves(2000).mean(0)
    weight = torch.randn(64, 24, generator=torch.Generator().manual_seed(5))
    grid = grid_of(weight, 3, 24, symmetric=False)
    sums = Sums((2, 2), torch.ones(24), torch.ones(24), seen)
    errors = [
        float(quadratic(weight - gptq(weight, second, grid), truth).sum())
        for second in (seen.mean(0), sums.statistics().second)
    ]
    assert errors[1] < errors[0]
    assert errors[1] < float(quadratic(weight - grid.nearest(weight), truth).sum())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(HastenError, match="no file of statistics"):
        StatisticsFile(tmp_path / "none.safetensors")
    (noise := tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    save_file({"x": torch.zeros(1)}, foreign := tmp_path / "foreign.safetensors")
    for file in (noise, foreign):
        with pytest.raises(HastenError, match="no file of statistics"):
            StatisticsFile(file)
    save_statistics(file := tmp_path / "old.safetensors", watched()[2], {"schema": 0})
    with pytest.raises(HastenError, match="another version"):
        StatisticsFile(file)


def test_tensors_that_do_not_fit_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, sites, watcher = watched()
    module(torch.randn(5, 8))
    bad = Sums((5, 0), torch.ones(8), torch.ones(7), torch.ones(2, 1, 8, 8))
    monkeypatch.setattr(watcher, "sums", lambda name: Sums(*map(_copied, vars(bad).values())))  # pyright: ignore
    file = save_statistics(tmp_path / "s.safetensors", watcher, {})
    with pytest.raises(HastenError, match="do not fit together"):
        StatisticsFile(file).statistics.of(sites[0])


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, torch.Tensor) else value
