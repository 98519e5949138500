"""The contract of a single technique, on every architecture (the full set on one U-Net and one DiT)."""

from __future__ import annotations

import pytest
import torch

from hasten.core.errors import HastenError, NoEffect, NotEngaged, Refused
from hasten.core.expression import parse
from hasten.core.patch import Patch
from hasten.core.recipe import Recipe
from hasten.core.target import Target
from hasten.core.technique import Technique
from tests.contract.rigs import (
    ARCHITECTURES,
    TECHNIQUES,
    Rig,
    covering,
    fingerprint,
    make,
    plain_output,
    refusals,
    trial,
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def applicable(name: str, architecture: str) -> Technique:
    technique = trial(name)
    if refusals(technique, make(architecture)):
        pytest.skip(f"{name} refuses {architecture}; see test_refusals")
    return technique


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_refusals_are_sentences(name: str, architecture: str) -> None:
    rig = make(architecture)
    reasons = refusals(trial(name), rig)
    before = fingerprint(rig)
    assert all(len(reason.split()) > 4 and reason.endswith(".") for reason in reasons), reasons
    if reasons:
        with pytest.raises(Refused):
            rig.accelerated(trial(name))
        assert fingerprint(rig) == before


COVERING = [(name, architecture) for name in TECHNIQUES for architecture in covering(name)]


@pytest.mark.parametrize(("name", "architecture"), COVERING)
def test_it_does_what_it_may_and_leaving_restores_everything(name: str, architecture: str) -> None:
    technique, rig = applicable(name, architecture), make(architecture)
    bystander = make(architecture)
    before, before_bystander = fingerprint(rig), fingerprint(bystander)
    with rig.accelerated(technique) as session:
        output = rig.run()
        assert fingerprint(bystander) == before_bystander
        assert torch.equal(bystander.run(), plain_output(architecture))
        assert technique.engaged(session).summary
        assert session.describe()
    assert {key for key in rig.scheduler.__dict__ if "hasten" in key} == set()
    assert fingerprint(rig)[1:] == before[1:]
    assert torch.equal(rig.run(), plain_output(architecture))
    close = torch.allclose(output, plain_output(architecture), atol=1e-4, rtol=1e-3)
    assert close or type(technique).lossy
    assert not (type(technique).lossy and torch.equal(output, plain_output(architecture))), "changed nothing"


@pytest.mark.parametrize("architecture", ["stable_diffusion", "dit"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_an_exception_in_mid_run_leaves_nothing(name: str, architecture: str) -> None:
    technique, rig = applicable(name, architecture), make(architecture)
    before = fingerprint(rig)
    with pytest.raises(InterruptedError, match="the last"):
        interrupt_twice(technique, rig)
    assert fingerprint(rig)[1:] == before[1:]
    assert torch.equal(rig.run(), plain_output(architecture))


def interrupt_twice(technique: Technique, rig: Rig) -> None:
    """The first exception is caught within the session, the second leaves it."""
    with rig.accelerated(technique):
        expected = rig.run(prompt=1)
        with pytest.raises(InterruptedError):
            rig.run(steps=5, stop_at=2)
        assert torch.equal(rig.run(prompt=1), expected), "state of the broken run leaked into the next one"
        try:
            rig.run(stop_at=2)
        except InterruptedError as error:
            raise InterruptedError("the last") from error


@pytest.mark.parametrize(("name", "architecture"), COVERING)
def test_the_setting_that_means_nothing_changes_nothing(name: str, architecture: str) -> None:
    inert = trial(name).inert()
    if inert is None or refusals(inert, make(architecture)):
        pytest.skip("no such setting, or refused")
    rig = make(architecture)
    with rig.accelerated(inert):
        assert torch.equal(rig.run(), plain_output(architecture))
        assert torch.equal(rig.run(steps=3, prompt=1), plain_output(architecture, steps=3, prompt=1))


@pytest.mark.parametrize("name", TECHNIQUES)
def test_texts_round_trip(name: str) -> None:
    for technique in (trial(name), type(trial(name)).build({})):
        recipe = Recipe((technique,))
        assert parse(repr(recipe)) == recipe
        assert parse(str(recipe)) == recipe
        assert Recipe.from_toml(recipe.to_toml("a description")) == recipe
        assert eval(repr(technique), {name: type(technique)}) == technique


@pytest.mark.parametrize("name", TECHNIQUES)
def test_it_is_documented(name: str) -> None:
    cls = type(trial(name))
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{name}(")
    assert all(item.metadata.get("about") for item in cls.settings().values()), "every parameter says what it means"
    architecture = accepting(name)
    assert isinstance(trial(name).cost(Target.of(make(architecture)), _workload()).extra_bytes, int)


def accepting(name: str) -> str:
    """An architecture on which a technique works; skips for one that works on no CPU."""
    found = next((a for a in ARCHITECTURES if not refusals(trial(name), make(a))), None)
    return found or pytest.skip(f"{name} refuses every architecture on the CPU; see test_refusals")


def _workload():
    from hasten.core.workload import Workload

    return Workload(prompts=("a",), steps=8)


@pytest.mark.parametrize("architecture", ["stable_diffusion", "dit"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_engaged_raises_before_a_run_and_after_sabotage(
    name: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    technique, rig = applicable(name, architecture), make(architecture)
    with rig.accelerated(technique) as session, pytest.raises(NotEngaged):
        technique.engaged(session)

    def ignore(self: Patch, obj: object, *args: object, **kwargs: object) -> int:
        self._record(obj, "sabotaged")
        return 1

    for verb in ("around", "set", "hold", "restride", "swap"):
        monkeypatch.setattr(Patch, verb, ignore)
    with rig.accelerated(technique) as session:
        rig.run()
        with pytest.raises(NotEngaged):
            technique.engaged(session)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_no_effect_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(trial(name)), "apply", lambda self, target, patch: None)
    architecture = accepting(name)
    with pytest.raises(NoEffect):
        make(architecture).accelerated(trial(name))


def test_a_subject_that_is_no_pipeline() -> None:
    from hasten.core.session import accelerate

    with pytest.raises(HastenError, match="not int"):
        accelerate(3, "CompileBlocks()")
