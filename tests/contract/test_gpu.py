"""The part of the contract that needs a GPU: no waiting for it, and everything as on the CPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from hasten.core.recipe import Recipe
from hasten.core.resolve import resolve
from hasten.core.target import Target
from tests.contract.rigs import TECHNIQUES, Rig, fingerprint, make, refusals, trial

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ON = ("flux", "stable_diffusion", "dit", "z_image")


class Watched(Rig):
    """A rig whose denoiser calls report every wait for the GPU."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig.spec, rig.denoiser, rig.vae)
        self.waits: list[str] = []

    def call(self, arguments: dict[str, Any]) -> Any:
        torch.cuda.synchronize()
        caught: list[warnings.WarningMessage] = []
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                return super().call(arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            self.waits += [str(w.message) for w in caught if "synchroniz" in str(w.message)]


def waits(rig: Rig, *names: str) -> int:
    watched = Watched(rig)
    with watched.accelerated(*map(trial, names)):
        watched.run()
        watched.waits.clear()
        watched.run(prompt=1)
    return len(watched.waits)


@pytest.mark.parametrize("architecture", ON)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_step_does_not_wait_for_the_gpu(name: str, architecture: str) -> None:
    if refusals(trial(name), make(architecture).to("cuda")) or type(trial(name)).syncs:
        pytest.skip("refused, or declares that it waits")
    assert waits(make(architecture).to("cuda"), name) <= waits(make(architecture).to("cuda"))


@pytest.mark.parametrize("architecture", ON)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_it_works_and_comes_off(name: str, architecture: str) -> None:
    rig = make(architecture).to("cuda")
    if refusals(trial(name), rig):
        pytest.skip("refused")
    torch.use_deterministic_algorithms(False)
    plain, before = rig.run(), fingerprint(rig)
    with rig.accelerated(trial(name)) as session:
        assert rig.run().isfinite().all()
        assert trial(name).engaged(session).summary
    assert fingerprint(rig)[1:] == before[1:]
    assert torch.allclose(rig.run(), plain, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", ON)
def test_inductor_compiles_every_cache(architecture: str) -> None:
    from hasten.compilation import CompileBlocks

    caches = [name for name in TECHNIQUES if name in ("FORA", "FirstBlockCache", "DeepCache")]
    for name in caches:
        rig, recipe = make(architecture).to("cuda"), Recipe((CompileBlocks(), trial(name)))
        if resolve(recipe, Target.of(rig)).refusals:
            continue
        with rig.accelerated(*recipe) as session:
            assert rig.run().isfinite().all()
            assert len(session.evidence()) == 2
