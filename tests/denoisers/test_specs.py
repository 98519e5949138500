"""Each architecture's declaration against the real classes, found out by running its tiny model."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from hasten.core.registry import specs
from hasten.core.spec import InputSize, Stack
from hasten.core.target import spec_of

NAMES = ["dit", "flux", "pixart", "qwen_image", "sd3", "sdxl", "stable_diffusion", "wan", "z_image"]
STACKED = [(name, i) for name in NAMES for i in range(len(specs()[name].stacks))]
PICTURE_OR_TEXT = {"hidden_states", "sample", "x", "encoder_hidden_states", "cap_feats"}
UNIFIED = {"z_image"}
"""Architectures whose denoised stream holds the text tokens too."""
GATED = [pair for pair in STACKED if pair != ("flux", 1)]
"""Stacks whose blocks consist of branches alone; FLUX's single-stream blocks compute their MLP inline."""

Call = tuple[tuple[Any, ...], dict[str, Any], Any]


@functools.cache
def tiny(name: str) -> nn.Module:
    return specs()[name].build_tiny()


def example(name: str, seed: int = 0, **size: int) -> dict[str, Any]:
    spec = specs()[name]
    return spec.example(spec.tiny, InputSize(**size), seed=seed)


def run(model: nn.Module, arguments: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        sample = model(**arguments, return_dict=False)[0]
    return list(sample)


@contextmanager
def recorded(modules: Iterable[nn.Module]) -> Generator[list[Call]]:
    calls: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args, kwargs, output))

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        yield calls


def members(model: nn.Module, stack: Stack) -> nn.ModuleList:
    found = model.get_submodule(stack.path)
    assert isinstance(found, nn.ModuleList)
    return found


def block_calls(name: str, stack: Stack, **size: int) -> list[Call]:
    model = tiny(name)
    with recorded(members(model, stack)) as calls:
        run(model, example(name, **size))
    return calls


def of_class(model: nn.Module, *names: str) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in names]


def test_every_architecture_is_registered_under_its_name():
    assert sorted(specs()) == NAMES
    assert all(name == spec.name for name, spec in specs().items())


@pytest.mark.parametrize("name", NAMES)
def test_tiny_model_runs_and_its_class_is_recognised(name: str):
    outputs = run(tiny(name), example(name, batch=2, height=16, width=16))
    assert len(outputs) == 2
    assert all(output.isfinite().all() for output in outputs)
    assert spec_of(tiny(name)) is specs()[name]


@pytest.mark.parametrize("name", NAMES)
def test_inputs_repeat_with_the_seed_and_only_then(name: str):
    first, again, other = (run(tiny(name), example(name, seed=seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dit"])
def test_inputs_need_not_be_square(name: str):
    flat, tall = (run(tiny(name), example(name, height=16, width=width))[0].numel() for width in (16, 24))
    assert 2 * tall == 3 * flat


@pytest.mark.parametrize("name", ["wan", "z_image"])
def test_inputs_honour_frames(name: str):
    one, three = (run(tiny(name), example(name, frames=frames))[0].numel() for frames in (1, 3))
    assert three == 3 * one


@pytest.mark.parametrize("name", NAMES)
def test_the_timestep_argument_exists_and_matters(name: str):
    model, argument = tiny(name), specs()[name].timestep
    assert argument in inspect.signature(model.forward).parameters
    arguments = example(name)
    sooner = arguments | {argument: arguments[argument] / 2}
    assert not torch.equal(run(model, arguments)[0], run(model, sooner)[0])


@pytest.mark.parametrize(("name", "index"), STACKED)
def test_stack_members_take_and_return_the_declared_streams(name: str, index: int):
    stack = specs()[name].stacks[index]
    blocks = members(tiny(name), stack)
    assert len(blocks) >= 3
    assert {type(block).__name__ for block in blocks} == {stack.block}
    parameters = list(inspect.signature(blocks[0].forward).parameters)
    assert tuple(parameters[: len(stack.takes)]) == stack.takes
    assert set(stack.returns) == set(stack.takes)
    assert stack.denoised in stack.takes
    for args, kwargs, output in block_calls(name, stack):
        check_call(stack, args, kwargs, output)


def check_call(stack: Stack, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    before, after = stack.read(args, kwargs), stack.unpack(output)
    assert isinstance(output, tuple) == (len(stack.returns) > 1)
    assert after[stack.denoised] is not None
    for stream, value in after.items():
        assert value is None or value.shape == before[stream].shape
    packed = stack.pack(after)
    assert packed is output or all(a is b for a, b in zip(packed, output, strict=True))


@pytest.mark.parametrize(("name", "index"), STACKED)
def test_streams_written_into_a_call_are_read_back(name: str, index: int):
    stack = specs()[name].stacks[index]
    args, kwargs, _ = block_calls(name, stack)[0]
    changed = {stream: value + 1 for stream, value in stack.read(args, kwargs).items()}
    kwargs = dict(kwargs)
    args = stack.write(args, kwargs, changed)
    block = members(tiny(name), stack)[0]
    assert all(stack.read(args, kwargs)[stream] is value for stream, value in changed.items())
    with torch.no_grad():
        assert stack.unpack(block(*args, **kwargs))[stack.denoised] is not None


@pytest.mark.parametrize(("name", "index"), STACKED)
def test_only_a_stack_that_hands_over_its_text_may_drop_it(name: str, index: int):
    """The text stream is None after the last block of the chain at most."""
    stack, calls = specs()[name].stacks[index], block_calls(name, specs()[name].stacks[index])
    assert all(value is not None for *_, output in calls[:-1] for value in stack.unpack(output).values())


@pytest.mark.parametrize(("name", "index"), STACKED)
def test_the_denoised_stream_follows_the_latent_size(name: str, index: int):
    stack = specs()[name].stacks[index]

    def tokens(**size: int) -> int:
        args, kwargs, _ = block_calls(name, stack, **size)[0]
        return stack.read(args, kwargs)[stack.denoised].shape[1]

    plain = tokens(height=16, width=16, text_tokens=32)
    larger = tokens(height=32, width=32, text_tokens=32)
    wordier = tokens(height=16, width=16, text_tokens=64)
    assert larger - plain == 3 * 8 * 8
    assert wordier - plain == (32 if name in UNIFIED else 0)


@pytest.mark.parametrize(("name", "index"), STACKED)
def test_branches_are_modules_of_the_blocks(name: str, index: int):
    stack = specs()[name].stacks[index]
    for branch in stack.branches:
        found = [getattr(block, branch) for block in members(tiny(name), stack)]
        assert all(part is None or isinstance(part, nn.Module) for part in found)
        assert isinstance(found[0], nn.Module)
        with recorded(part for part in found if part is not None) as calls:
            run(tiny(name), example(name))
        assert len(calls) == sum(part is not None for part in found)


@pytest.mark.parametrize(("name", "index"), GATED)
def test_nothing_but_the_branches_changes_the_streams(name: str, index: int):
    """A block whose branches yield zero passes its streams on: they are gated, added, and complete."""
    stack = specs()[name].stacks[index]
    calls = block_calls(name, stack)
    for block, (args, kwargs, _) in zip(members(tiny(name), stack), calls, strict=True):
        with ExitStack() as hooks, torch.no_grad():
            for branch in stack.branches:
                if (part := getattr(block, branch)) is not None:
                    hooks.enter_context(part.register_forward_hook(zeros))
            after = stack.unpack(block(*args, **kwargs))
        before = stack.read(args, kwargs)
        assert all(value is None or torch.equal(value, before[n]) for n, value in after.items())


def zeros(module: nn.Module, args: object, output: Any) -> Any:
    return tuple(map(torch.zeros_like, output)) if isinstance(output, tuple) else torch.zeros_like(output)


@pytest.mark.parametrize("name", ["sdxl", "stable_diffusion"])
def test_unet_stages_exist(name: str):
    spec, model = specs()[name], tiny(name)
    assert spec.unet is not None
    down, up = model.get_submodule(spec.unet.down), model.get_submodule(spec.unet.up)
    assert isinstance(down, nn.ModuleList)
    assert isinstance(up, nn.ModuleList)
    assert len(down) == len(up) == 3
    assert isinstance(model.get_submodule(spec.unet.mid), nn.Module)


@pytest.mark.parametrize("name", NAMES)
def test_repeated_blocks_are_those_of_diffusers_or_the_stacks(name: str):
    spec, model = specs()[name], tiny(name)
    assert all(len(of_class(model, block)) >= 2 for block in spec.repeated_blocks)
    own = getattr(model, "_repeated_blocks", None) or [stack.block for stack in spec.stacks]
    assert list(spec.repeated_blocks) == own


class Attended(TorchFunctionMode):
    """Counts calls of scaled dot-product attention, inside and outside the given modules."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.depth = self.inside = self.outside = 0
        for module in modules:
            module.register_forward_pre_hook(self.enter)
            module.register_forward_hook(self.leave)

    def enter(self, module: nn.Module, args: object) -> None:
        self.depth += 1

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        self.depth -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            self.inside += self.depth > 0
            self.outside += self.depth == 0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_all_attention_happens_in_the_declared_classes(name: str):
    spec, model = specs()[name], specs()[name].build_tiny()
    assert all(of_class(model, attention) for attention in spec.attention)
    modules = of_class(model, *spec.attention)
    assert all(cast(int, module.heads) >= 2 for module in modules)
    with Attended(modules) as mode:
        run(model, example(name))
    assert (mode.inside, mode.outside) == (len(modules), 0)


@pytest.mark.parametrize("name", NAMES)
def test_modulation_is_what_sees_neither_picture_nor_text(name: str):
    """Exactly the linears whose input stays the same when picture and text change, found by running."""
    spec, model = specs()[name], tiny(name)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    other = {key: value for key, value in example(name, seed=1).items() if key in PICTURE_OR_TEXT}
    before, after = (linear_inputs(model, linears, example(name) | new) for new in ({}, other))
    constant = {path for path in before if torch.equal(before[path], after[path])}
    assert constant == {path for path in linears if any(fnmatchcase(path, g) for g in spec.modulation)}
    assert all(any(fnmatchcase(path, glob) for path in linears) for glob in spec.modulation)


def linear_inputs(
    model: nn.Module, linears: dict[str, nn.Linear], arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def remember(path: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found[path] = args[0]

    with ExitStack() as hooks:
        for path, linear in linears.items():
            hooks.enter_context(linear.register_forward_pre_hook(functools.partial(remember, path)))
        run(model, arguments)
    return found


def test_flux_embeds_guidance_only_where_the_model_does():
    spec = specs()["flux"]
    assert "guidance" in spec.example(spec.tiny)
    assert "guidance" not in spec.example({**spec.tiny, "guidance_embeds": False})


def test_pixart_gives_sizes_where_the_model_was_trained_with_them():
    spec = specs()["pixart"]
    with_sizes = {**spec.tiny, "use_additional_conditions": True}
    arguments = spec.example(with_sizes, InputSize(batch=2, height=16, width=24))
    assert arguments["added_cond_kwargs"]["resolution"].tolist() == [[128.0, 192.0]] * 2
    assert run(spec.build(with_sizes), arguments)[0].isfinite().all()
