"""DeepCache against the authors' own package (DeepCache 0.1.1), where it is installed, on the bundled U-Net.

The package finds the step as the index of the timestep in `scheduler.timesteps` and computes where it is a multiple of
the interval from the first one it saw: the steps of a request counted from 0, as here. It numbers branches with
three layers a stage, whatever the U-Net has.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.cache.deep_cache import DeepCache
from hasten.core.session import accelerate
from hasten.models import load

peer: Any = pytest.importorskip("DeepCache", reason="the authors' package is not installed")
LAYERS, THEIR_LAYERS = 2, 3


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipeline: Any = load("emoji-sd").pipeline
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipe: Any, steps: int = 7) -> torch.Tensor:
    call: dict[str, Any] = {"width": 128, "height": 128, "guidance_scale": 4.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return pipe("rocket, noto style", num_inference_steps=steps, generator=generator, **call).images


@pytest.mark.parametrize(("interval", "branch"), [(3, 0), (2, 1), (5, 2), (3, 3), (3, 5)])
def test_it_equals_the_authors_package(pipe: Any, interval: int, branch: int) -> None:
    plain = latents(pipe)
    helper = peer.DeepCacheSDHelper(pipe=pipe)
    stage, layer = divmod(branch, LAYERS)
    helper.set_params(cache_interval=interval, cache_branch_id=THEIR_LAYERS * stage + layer)
    helper.enable()
    try:
        theirs = latents(pipe)
    finally:
        helper.disable()
    for part in pipe.unet.modules():  # the package leaves its wrappers' attributes behind
        part.__dict__.pop("forward", None)
    with accelerate(pipe, DeepCache(interval=interval, branch=branch)):
        ours = latents(pipe)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-2)
