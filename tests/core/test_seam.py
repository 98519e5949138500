"""The seam: what hasten intercepts works together with compilation, LoRA, offloading and ControlNet, in any order."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from peft import LoraConfig
from torch.overrides import TorchFunctionMode

from hasten.cache import FirstBlockCache
from hasten.compilation import CompileBlocks
from hasten.core.registry import specs
from hasten.core.session import Session
from tests.contract.rigs import Rig, make
from tests.core.stand_ins import sized_flux

STEPS = 4
CACHE = FirstBlockCache(threshold=0.5)
SOME_BREAKS = CompileBlocks(backend="eager", fullgraph=False)
NO_BREAKS = CompileBlocks(backend="eager")


def add_lora(rig: Rig, name: str = "style") -> None:
    model: Any = rig.denoiser
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = ["to_q", "to_v", "proj_mlp", "proj"]
        model.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False), name)


def offload(rig: Rig) -> None:
    cpu = torch.device("cpu")
    model: Any = rig.denoiser
    apply_group_offloading(model, cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1)


def remove_offload(rig: Rig) -> None:
    for module in rig.denoiser.modules():
        if registry := module.__dict__.get("_diffusers_hook"):
            for name in list(registry.hooks):
                registry.remove_hook(name)
            del module._diffusers_hook


INSTALL: dict[str, Callable[[Rig], Any]] = {
    "cache": lambda rig: rig.accelerated(CACHE),
    "compile": lambda rig: rig.accelerated(SOME_BREAKS),
    "lora": add_lora,
    "offload": offload,
}
ORDERS = tuple(itertools.permutations(INSTALL))


@torch.no_grad()
def denoise(rig: Rig, **more: Any) -> torch.Tensor:
    given = rig.spec.example(rig.denoiser.config) | more  # pyright: ignore
    rig.scheduler.set_timesteps(STEPS)
    latents = given["hidden_states"]
    for timestep in rig.scheduler.timesteps:
        output = rig.denoiser(**given | {"hidden_states": latents, "timestep": timestep[None] / 1000})[0]
        latents = rig.scheduler.step(output, timestep, latents, return_dict=False)[0]
    return latents


def decisions(session: Session) -> tuple[bool, ...]:
    (steps,) = session.evidence()[CACHE].step_map.values()
    return steps


@functools.cache
def expected() -> tuple[torch.Tensor, tuple[bool, ...]]:
    """Output and decisions of the cache on a model with the LoRA, and nothing else."""
    rig = sized_flux(1, 2)
    add_lora(rig)
    with rig.accelerated(CACHE) as session:
        return denoise(rig), decisions(session)


class Residency(TorchFunctionMode):
    """Raises when a linear layer runs on weights that are offloaded, as a GPU would."""

    def __init__(self) -> None:
        super().__init__()
        self.away: set[int] = set()
        self.moves = 0

    def move(self, group: Any, *, away: bool) -> None:
        weights = {id(weight) for module in group.modules for weight in module.parameters()}
        self.away = self.away | weights if away else self.away - weights
        self.moves += not away

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            assert id(args[1]) not in self.away, "a linear layer ran on offloaded weights"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def residency(monkeypatch: pytest.MonkeyPatch) -> Residency:
    book = Residency()
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: book.move(group, away=False))
    monkeypatch.setattr(ModuleGroup, "offload_", lambda group: book.move(group, away=True))
    return book


def check_and_revert(rig: Rig, installed: dict[str, Any], plain: torch.Tensor, *, book: Any = None) -> None:
    """The output and decisions are as expected; taking all off again gives the plain model."""
    for _ in range(2):
        with book or nullcontext():
            output = denoise(rig)
        torch.testing.assert_close(output, expected()[0], atol=1e-5, rtol=0.0)
        assert decisions(installed["cache"]) == expected()[1]
    for name in ("cache", "compile"):
        installed[name].close()
    assert not traces(rig)
    remove_offload(rig)
    rig.denoiser.delete_adapters("style")  # pyright: ignore
    assert torch.equal(denoise(rig), plain)


def traces(rig: Rig) -> list[str]:
    """What hasten left on any module or on the scheduler."""
    objects: list[object] = [*rig.denoiser.modules(), rig.scheduler]
    names = [name for obj in objects for name in (*vars(obj), *vars(type(obj)))]
    compiled = [module for module in rig.denoiser.modules() if module._compiled_call_impl is not None]
    return [name for name in names if "hasten" in name] + [type(module).__name__ for module in compiled]


def test_the_cache_both_computes_and_reuses() -> None:
    assert expected()[1] == (True, False, True, False)


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_any_order_of_installing_four_things(order: tuple[str, ...], residency: Residency) -> None:
    """Compiled blocks run eagerly here, so that all orders are tried; tracing is tried below."""
    rig = sized_flux(1, 2)
    plain = denoise(rig)
    with torch.compiler.set_stance("force_eager"):
        installed = {name: INSTALL[name](rig) for name in order}
        check_and_revert(rig, installed, plain, book=residency)
    assert residency.moves


def test_four_things_really_compiled() -> None:
    torch._dynamo.reset()
    rig = sized_flux(1, 2)
    plain = denoise(rig)
    installed = {name: INSTALL[name](rig) for name in ("offload", "lora", "compile", "cache")}
    check_and_revert(rig, installed, plain)
    assert installed["compile"].evidence()


@pytest.mark.parametrize("order", ["compile cache lora", "lora cache compile"])
def test_three_things_compiled_without_a_break(order: str) -> None:
    torch._dynamo.reset()
    rig = sized_flux(1, 2)
    plain = denoise(rig)
    install = INSTALL | {"compile": lambda rig: rig.accelerated(NO_BREAKS)}
    installed = {name: install[name](rig) for name in order.split()}
    check_and_revert(rig, installed, plain)


@pytest.mark.parametrize("action", ["disable_adapters", "delete_adapters"])
@pytest.mark.parametrize("added", ["before", "inside"])
def test_a_lora_may_come_and_go_around_and_inside_a_session(action: str, added: str) -> None:
    rig, off = sized_flux(1, 2), FirstBlockCache(threshold=0.0)
    model: Any = rig.denoiser
    plain = denoise(rig)
    add_lora(rig)
    styled = denoise(rig)
    assert not torch.equal(styled, plain)
    if added == "inside":
        model.delete_adapters("style")
    with rig.accelerated(off):
        if added == "inside":
            assert torch.equal(denoise(rig), plain)
            add_lora(rig)
        assert torch.equal(denoise(rig), styled)
        getattr(model, action)(*(["style"] if action.startswith("delete") else []))
        assert torch.equal(denoise(rig), plain)
    assert torch.equal(denoise(rig), plain)
    if action.startswith("disable"):
        model.enable_adapters()
        assert torch.equal(denoise(rig), styled)


def controls(architecture: str, seed: int) -> dict[str, Any]:
    """Random ControlNet residuals, one for each block."""
    generator = torch.Generator().manual_seed(seed)

    def residuals(count: int, *shape: int) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator) for _ in range(count)]

    if architecture == "sd3":
        return {"block_controlnet_hidden_states": residuals(specs()["sd3"].tiny["num_layers"], 1, 64, 32)}
    return {
        "controlnet_block_samples": residuals(3, 1, 64, 32),
        "controlnet_single_block_samples": residuals(3, 1, 64, 32),
    }


@contextmanager
def two_steps(rig: Rig) -> Generator[Callable[..., tuple[torch.Tensor, torch.Tensor]]]:
    """A function that makes one call a step; returns the output and what goes into the last norm."""
    given, last = rig.spec.example(rig.spec.tiny), list[torch.Tensor]()
    hook = rig.denoiser.get_submodule("norm_out").register_forward_pre_hook(lambda _, args: last.append(args[0]))
    rig.scheduler.set_timesteps(8)
    steps = iter(rig.scheduler.timesteps)

    @torch.no_grad()
    def call(*args: Any, **more: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = rig.denoiser(*args, **given | more)[0] if not args else rig.denoiser(*args)[0]
        rig.scheduler.step(torch.zeros(1), next(steps), torch.zeros(1))
        return output, last[-1]

    yield call
    hook.remove()


ALWAYS = FirstBlockCache(threshold=1e30)


@pytest.mark.parametrize("architecture", ["flux", "sd3"])
def test_a_reused_step_with_controlnet_equals_the_full_one(architecture: str) -> None:
    rig, control = make(architecture), controls(architecture, 0)
    with two_steps(rig) as call:
        plain, _ = call(**control)
        assert (plain - call()[0]).abs().max() > 0.1, "the residuals must matter"
        with rig.accelerated(ALWAYS) as session:
            rig.scheduler.set_timesteps(8)
            full, _ = call(**control)
            reused, _ = call(**control)
            assert session.evidence()[ALWAYS].reused_steps == 1
    assert torch.equal(full, plain)
    torch.testing.assert_close(reused, full, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["flux", "sd3"])
def test_fresh_controlnet_residuals_are_used_on_a_reused_step(architecture: str) -> None:
    rig, old, new = make(architecture), controls(architecture, 0), controls(architecture, 1)
    with two_steps(rig) as call, rig.accelerated(ALWAYS):
        rig.scheduler.set_timesteps(8)
        _, before = call(**old)
        _, after = call(**new)
    added = sum(sum(new[name]) - sum(old[name]) for name in new)
    if architecture == "sd3":  # the last block drops the text, and diffusers adds nothing after it
        name = "block_controlnet_hidden_states"
        added = sum(new[name][:-1]) - sum(old[name][:-1])
    torch.testing.assert_close(after[:, -64:], before[:, -64:] + added, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_controlnet_may_start_and_end_within_a_request(first: bool) -> None:
    rig, control = make("flux"), controls("flux", 0)
    added = sum(sum(values) for values in control.values()) * (-1 if first else 1)
    with two_steps(rig) as call, rig.accelerated(ALWAYS):
        rig.scheduler.set_timesteps(8)
        _, before = call(**control if first else {})
        _, after = call(**{} if first else control)
    torch.testing.assert_close(after, before + added, atol=1e-5, rtol=1e-5)


def test_residuals_given_by_position_are_noticed() -> None:
    rig, control = make("flux"), controls("flux", 0)
    given = rig.spec.example(rig.spec.tiny) | control
    names = [
        "hidden_states",
        "encoder_hidden_states",
        "pooled_projections",
        "timestep",
        "img_ids",
        "txt_ids",
        "guidance",
    ]
    args = [*(given[name] for name in names), None, *control.values()]
    with two_steps(rig) as call, rig.accelerated(ALWAYS):
        rig.scheduler.set_timesteps(8)
        full, _ = call(*args)
        reused, _ = call(*args)
    torch.testing.assert_close(reused, full, atol=1e-6, rtol=1e-5)
