"""Interception: one object's method, any order of removal, and no trace in copies, files or signatures."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from torch import nn

from hasten.core.errors import PatchError
from hasten.core.intercept import base_class, intercept
from tests.contract.rigs import make


class Greeter:
    """Says its own name; what interceptors add stands around it."""

    def __init__(self) -> None:
        self.name = "x"

    def greet(self) -> str:
        return self.name

    def part(self) -> str:
        return self.name


def tagged(tag: str) -> Callable[..., str]:
    return lambda call: f"{tag}({call()})"


def passing(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return call(*args, **kwargs)


def adding(amount: float) -> Callable[..., Any]:
    return lambda call, *args, **kwargs: call(*args, **kwargs) + amount


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


PERMUTATIONS = tuple(itertools.permutations("abc"))


@pytest.mark.parametrize("installed", PERMUTATIONS, ids="".join)
@pytest.mark.parametrize("removed", PERMUTATIONS, ids="".join)
def test_links_come_off_in_any_order(installed: tuple[str, ...], removed: tuple[str, ...]) -> None:
    greeter = Greeter()
    removers = {tag: intercept(greeter, "greet", tagged(tag)) for tag in installed}
    left = list(installed)
    for tag in removed:
        expected = "x"
        for present in left:
            expected = f"{present}({expected})"
        assert greeter.greet() == expected
        removers[tag]()
        left.remove(tag)
    assert greeter.greet() == "x"
    assert type(greeter) is Greeter
    assert vars(greeter) == {"name": "x"}


def test_outermost_stays_outside_whatever_comes_later() -> None:
    greeter = Greeter()
    removers = [
        intercept(greeter, "greet", tagged("a")),
        intercept(greeter, "greet", tagged("first"), outermost=True),
        intercept(greeter, "greet", tagged("second"), outermost=True),
        intercept(greeter, "greet", tagged("b")),
    ]
    assert greeter.greet() == "second(first(b(a(x))))"
    removers[1]()
    intercept(greeter, "greet", tagged("c"))
    assert greeter.greet() == "second(c(b(a(x))))"


def test_several_methods_of_one_object() -> None:
    greeter = Greeter()
    first = intercept(greeter, "greet", tagged("a"))
    second = intercept(greeter, "part", tagged("b"))
    assert (greeter.greet(), greeter.part()) == ("a(x)", "b(x)")
    first()
    assert (greeter.greet(), greeter.part()) == ("x", "b(x)")
    second()
    assert type(greeter) is Greeter


def test_the_same_link_twice_is_two_links() -> None:
    greeter, link = Greeter(), tagged("a")
    removers = [intercept(greeter, "greet", link) for _ in range(2)]
    assert greeter.greet() == "a(a(x))"
    removers[0]()
    assert greeter.greet() == "a(x)"


def test_removing_twice_is_harmless() -> None:
    greeter = Greeter()
    outer, inner = intercept(greeter, "greet", tagged("a")), intercept(greeter, "greet", tagged("b"))
    outer()
    outer()
    assert greeter.greet() == "b(x)"
    inner()
    inner()
    outer()
    assert type(greeter) is Greeter


def test_another_instance_is_untouched() -> None:
    one, other = Greeter(), Greeter()
    intercept(one, "greet", tagged("a"))
    assert (one.greet(), other.greet()) == ("a(x)", "x")
    assert type(other) is Greeter
    assert "greet" not in vars(other)


def test_an_exception_passes_through_and_leaves_the_chain_whole() -> None:
    greeter = Greeter()

    def failing(call: Callable[[], str]) -> str:
        raise ValueError(call())

    remove = intercept(greeter, "greet", failing)
    for _ in range(2):
        with pytest.raises(ValueError, match="x"):
            greeter.greet()
    remove()
    assert greeter.greet() == "x"


def test_identity_of_the_class_is_kept() -> None:
    model = make("flux").denoiser
    block = model.get_submodule("transformer_blocks.0")
    original = type(block)
    intercept(block, "__call__", passing)
    assert type(block) is not original
    assert isinstance(block, original)
    assert base_class(block) is original
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(block), name) == getattr(original, name)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda obj: pickle.loads(pickle.dumps(obj))])
def test_copies_are_clean(duplicate: Callable[[nn.Linear], nn.Linear]) -> None:
    linear, given = nn.Linear(3, 3), torch.randn(2, 3)
    plain = linear(given)
    remove = intercept(linear, "__call__", adding(1.0))
    twin = duplicate(linear)
    assert type(twin) is nn.Linear
    assert set(vars(twin)) == set(vars(nn.Linear(3, 3)))
    assert torch.equal(twin(given), plain)
    assert torch.equal(linear(given), plain + 1.0)
    intercept(twin, "__call__", adding(2.0))
    assert torch.equal(twin(given), plain + 2.0)
    remove()
    assert torch.equal(linear(given), plain)


def test_torch_save_keeps_no_trace(tmp_path: Path) -> None:
    linear = nn.Linear(3, 3)
    intercept(linear, "__call__", adding(1.0))
    torch.save(linear, tmp_path / "linear.pt")
    assert type(torch.load(tmp_path / "linear.pt", weights_only=False)) is nn.Linear


def test_a_deep_copy_of_a_model_runs_its_own_blocks() -> None:
    rig = make("flux")
    calls: list[str] = []

    def noting(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append("original")
        return call(*args, **kwargs)

    for block in (rig.denoiser, rig.denoiser.get_submodule("transformer_blocks.0")):
        intercept(block, "__call__", noting)
    twin = copy.deepcopy(rig.denoiser)
    with torch.no_grad():
        twin(**rig.spec.example(rig.spec.tiny))
    assert not calls


class Slotted:
    """Has slots, and a dictionary as well."""

    __slots__ = ("__dict__", "value")

    def __init__(self) -> None:
        self.value = 3

    def greet(self) -> str:
        return f"{self.value}"


class OnlySlots:
    """Has no dictionary, so nowhere to keep a chain."""

    __slots__ = ("value",)

    def greet(self) -> str:
        return "x"


def test_slots_beside_a_dictionary() -> None:
    slotted = Slotted()
    remove = intercept(slotted, "greet", tagged("a"))
    twin = copy.deepcopy(slotted)
    assert (slotted.greet(), twin.greet()) == ("a(3)", "3")
    assert type(twin) is Slotted
    assert not vars(twin)
    remove()
    assert type(slotted) is Slotted
    assert not vars(slotted)


class Rebuilt:
    """Says itself how it is copied."""

    def __init__(self, name: str) -> None:
        self.name = name

    def greet(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.name,))


def test_an_object_that_says_how_it_is_copied() -> None:
    rebuilt = Rebuilt("y")
    intercept(rebuilt, "greet", tagged("a"))
    for twin in (copy.deepcopy(rebuilt), pickle.loads(pickle.dumps(rebuilt))):
        assert type(twin) is Rebuilt
        assert twin.greet() == "y"


@pytest.mark.parametrize("subject", [OnlySlots(), {}, object()])
def test_objects_without_attributes_are_refused(subject: object) -> None:
    method = "greet" if isinstance(subject, OnlySlots) else "__str__"
    with pytest.raises(PatchError, match="cannot be intercepted"):
        intercept(subject, method, passing)


def test_an_unknown_method_is_refused_and_changes_nothing() -> None:
    greeter = Greeter()
    for method in ("hello", "name"):
        with pytest.raises(PatchError, match=f"Greeter has no method '{method}'"):
            intercept(greeter, method, passing)
    assert type(greeter) is Greeter
    assert vars(greeter) == {"name": "x"}


def test_a_class_that_cannot_change_leaves_no_trace() -> None:
    subject = tagged("a")
    with pytest.raises(PatchError, match="does not allow its methods to be intercepted"):
        intercept(subject, "__call__", passing)
    assert not vars(subject)


def test_a_foreign_class_swap_is_reported_and_removal_works_afterwards() -> None:
    linear, given = nn.Linear(3, 3), torch.randn(2, 3)
    plain = linear(given)
    remove = intercept(linear, "__call__", adding(1.0))
    parametrize.register_parametrization(linear, "weight", Doubled())
    with pytest.raises(PatchError, match=r"changed by other code .*ParametrizedLinear.*undo that change first"):
        remove()
    with pytest.raises(PatchError, match="changed by other code"):
        intercept(linear, "__call__", adding(5.0))
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    assert torch.equal(linear(given), plain + 1.0)
    remove()
    assert type(linear) is nn.Linear
    assert torch.equal(linear(given), plain)


def test_signatures_are_kept_for_code_that_inspects_them() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    expected = {name: inspect.signature(getattr(scheduler, name)) for name in ("set_timesteps", "step")}
    for name in expected:
        intercept(scheduler, name, passing)
    assert {name: inspect.signature(getattr(scheduler, name)) for name in expected} == expected
    timesteps: Any
    timesteps, count = retrieve_timesteps(scheduler, sigmas=[1.0, 0.5])
    assert (len(timesteps), count) == (2, 2)


def test_an_intercepted_model_saves_as_itself(tmp_path: Path) -> None:
    rig = make("flux")
    keys = list(rig.denoiser.state_dict())
    for path in ("", "transformer_blocks", "transformer_blocks.0", "single_transformer_blocks.1"):
        module = rig.denoiser.get_submodule(path)
        intercept(module, "__iter__" if isinstance(module, nn.ModuleList) else "__call__", passing)
    assert list(rig.denoiser.state_dict()) == keys
    rig.denoiser.save_pretrained(tmp_path)  # pyright: ignore
    reloaded = FluxTransformer2DModel.from_pretrained(tmp_path).eval()  # pyright: ignore
    assert list(reloaded.state_dict()) == keys
    assert all(torch.equal(value, reloaded.state_dict()[key]) for key, value in rig.denoiser.state_dict().items())
    given = rig.spec.example(rig.spec.tiny)
    with torch.no_grad():
        assert torch.allclose(reloaded(**given)[0], rig.denoiser(**given)[0], atol=1e-5)


def test_an_intercepted_scheduler_saves_as_itself(tmp_path: Path) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    intercept(scheduler, "step", passing)
    scheduler.save_pretrained(tmp_path)
    reloaded = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert type(reloaded) is FlowMatchEulerDiscreteScheduler
    assert reloaded.config["shift"] == 3.0
    assert '"_class_name": "FlowMatchEulerDiscreteScheduler"' in (tmp_path / "scheduler_config.json").read_text()
    remade = type(scheduler).from_config(scheduler.config)
    assert isinstance(remade, FlowMatchEulerDiscreteScheduler)
    assert type(copy.copy(remade)) is FlowMatchEulerDiscreteScheduler
