"""The part of the contract that needs a GPU: no waiting for it, and everything as on the CPU."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from hasten.core.recipe import Recipe
from hasten.core.registry import techniques
from hasten.core.resolve import resolve
from hasten.core.target import Target
from hasten.core.technique import Stage, Technique
from tests.contract.rigs import TECHNIQUES, Rig, fingerprint, make, refusals, trial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON = ("flux", "stable_diffusion", "dit", "z_image")


class Watched(Rig):
    """A rig whose denoiser calls report every wait for the GPU, those of a request's first step apart."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig.spec, rig.denoiser, rig.vae)
        self.waits: list[str] = []
        self.first_waits: list[str] = []

    def call(self, arguments: dict[str, Any]) -> Any:
        given = arguments[self.spec.timestep].flatten()[0]
        found = self.first_waits if bool(given == self.scheduler.timesteps[0]) else self.waits
        torch.cuda.synchronize()
        caught: list[warnings.WarningMessage] = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return super().call(arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [str(w.message) for w in caught if "synchroniz" in str(w.message)]


def waits(rig: Rig, *recipe: Technique) -> int:
    watched = Watched(rig)
    with watched.accelerated(*recipe):
        watched.run()
        watched.waits.clear()
        watched.run(prompt=1)
    return len(watched.waits)


@pytest.mark.parametrize("architecture", ON)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_step_does_not_wait_for_the_gpu(name: str, architecture: str) -> None:
    if refusals(trial(name), make(architecture).to("cuda")) or trial(name).waits():
        pytest.skip("refused, or declares that it waits")
    assert waits(make(architecture).to("cuda"), trial(name)) <= waits(make(architecture).to("cuda"))


@pytest.mark.parametrize("architecture", ON)
def test_a_modulation_table_waits_once_a_request_to_see_whether_it_still_holds(architecture: str) -> None:
    watched = Watched(make(architecture).to("cuda"))
    with watched.accelerated(techniques()["ModulationTable"]()):
        watched.run()
        watched.waits.clear()
        watched.first_waits.clear()
        watched.run()
    calls = 2 if watched.spec.guidance == "separate" else 1
    assert not watched.waits
    assert len(watched.first_waits) <= 2 * calls


@pytest.mark.parametrize("architecture", ON)
@pytest.mark.parametrize("name", ["FirstBlockCache", "DBCache"])
def test_a_late_decision_does_not_wait_either(name: str, architecture: str) -> None:
    """Whoever decides in the step itself waits once a step: that shows that the test would notice."""
    late, waiting = (replace(trial(name), late=late, threshold=0.1) for late in (True, False))  # pyright: ignore
    plain = waits(make(architecture).to("cuda"))
    assert waits(make(architecture).to("cuda"), late) <= plain
    assert waits(make(architecture).to("cuda"), waiting) > plain


@pytest.mark.parametrize("architecture", ON)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_it_works_and_comes_off(name: str, architecture: str) -> None:
    technique, rig = trial(name), make(architecture).to("cuda")
    if refusals(technique, rig):
        pytest.skip("refused")
    torch.use_deterministic_algorithms(False)
    plain, before = rig.run(), fingerprint(rig)
    with rig.accelerated(technique) as session:
        assert rig.run().isfinite().all()
        assert technique.engaged(session).summary
    assert fingerprint(rig)[1:] == before[1:]
    assert torch.allclose(rig.run(), plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", ON)
@pytest.mark.parametrize("name", [name for name, cls in techniques().items() if cls.stage == Stage.CACHE])
def test_inductor_compiles_every_cache(name: str, architecture: str) -> None:
    from hasten.compilation import CompileBlocks

    compiled = CompileBlocks()
    rig, cache = make(architecture).to("cuda"), trial(name)
    if resolve(Recipe((compiled, cache)), Target.of(rig)).refusals:
        pytest.skip("refused")
    torch._dynamo.reset()
    with rig.accelerated(cache):
        eager = [rig.run(), rig.run(steps=5, prompt=1)]
    with rig.accelerated(compiled, cache) as session:
        outputs = [rig.run(), rig.run(steps=5, prompt=1)]
        assert len(session.evidence()) == 2
    for output, expected in zip(outputs, eager, strict=True):
        # Tiny random models amplify rounding: single values may differ, the result as a whole must not.
        assert (output - expected).norm() < 0.02 * expected.norm()
