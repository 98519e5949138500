"""Released configurations, built on the meta device: sizes as published, and recognised as what they are."""

from __future__ import annotations

import functools
import inspect
from fnmatch import fnmatchcase

import diffusers
import pytest
from torch import nn

from hasten.core.registry import specs
from hasten.core.target import find_released, spec_of

PARAMETERS = {
    "FLUX.1-dev": 11_901_408_320,
    "FLUX.1-schnell": 11_891_178_560,
    "stable-diffusion-v1-5": 859_520_964,
    "stable-diffusion-2-1": 865_910_724,
    "stable-diffusion-xl-base-1.0": 2_567_463_684,
    # The paper's 675,129,632, with a timestep and class embedding in each of 28 blocks instead of one,
    # and without the position table, which diffusers keeps as a buffer.
    "DiT-XL-2-256": 675_129_632 + 27 * (257 * 1152 + 1153 * 1152 + 1001 * 1152) - 256 * 1152,
    "DiT-XL-2-512": 675_129_632 + 27 * (257 * 1152 + 1153 * 1152 + 1001 * 1152) - 256 * 1152,
    "PixArt-XL-2-512x512": 610_856_096,
    "PixArt-XL-2-1024-MS": 611_349_152,
    "PixArt-Sigma-XL-2-1024-MS": 610_856_096,
    "stable-diffusion-3-medium": 2_028_328_000,
    "stable-diffusion-3.5-medium": 2_243_171_520,
    "stable-diffusion-3.5-large": 8_056_627_520,
    "Qwen-Image": 20_430_401_088,
    "Wan2.1-T2V-1.3B": 1_418_996_800,
    "Wan2.1-T2V-14B": 14_288_491_584,
    "Wan2.2-T2V-A14B": 14_288_491_584,
    "Wan2.2-TI2V-5B": 4_999_787_712,
    "Z-Image": 6_154_908_736,
    "Z-Image-Turbo": 6_154_908_736,
}
"""Exact counts of the released weights. They round to the figures of the model cards, save SD3.5-medium's 2.5
billion, which include the position table of 384 x 384 x 1536 numbers."""


@functools.cache
def released(model: str) -> nn.Module:
    spec, entry = find_released(model)
    return spec.build(entry.config, device="meta")


@pytest.mark.parametrize("model", PARAMETERS)
def test_released_configuration_has_the_published_parameters(model: str):
    built, (spec, _) = released(model), find_released(model)
    assert sum(parameter.numel() for parameter in built.parameters()) == PARAMETERS[model]
    assert all(parameter.is_meta for parameter in built.parameters())
    assert spec_of(built) is spec


@pytest.mark.parametrize("model", PARAMETERS)
def test_the_declaration_holds_at_full_size(model: str):
    built, (spec, _) = released(model), find_released(model)
    linears = [path for path, module in built.named_modules() if isinstance(module, nn.Linear)]
    assert all(any(fnmatchcase(path, glob) for path in linears) for glob in spec.modulation)
    classes = {type(module).__name__ for module in built.modules()}
    assert classes >= {*spec.attention, *spec.repeated_blocks}
    for stack in spec.stacks:
        blocks = list(built.get_submodule(stack.path).children())
        assert {type(block).__name__ for block in blocks} == {stack.block}
        assert all(hasattr(block, branch) for block in blocks for branch in stack.branches)


def test_every_released_model_has_a_size_to_meet():
    assert {model for spec in specs().values() for model in spec.released} == set(PARAMETERS)


@pytest.mark.parametrize("model", PARAMETERS)
def test_released_models_name_their_source_and_pipeline(model: str):
    spec, entry = find_released(model)
    assert entry.source.startswith("https://huggingface.co/")
    assert entry.width % 16 == entry.height % 16 == 0
    assert (entry.text_tokens == 0) == (spec.name == "dit")
    assert spec.latent_channels in entry.config
    source = inspect.getsource(getattr(diffusers, entry.pipeline).__call__)
    # Only FLUX's pipeline has separate calls as well, for checkpoints without embedded guidance.
    assert ('cache_context("uncond"' in source) == (spec.guidance in ("separate", "embedded"))


@pytest.mark.parametrize(("name", "rival"), [("stable_diffusion", "sdxl"), ("sdxl", "stable_diffusion")])
def test_architectures_of_one_class_are_told_apart(name: str, rival: str):
    mine, theirs = specs()[name], specs()[rival]
    assert mine.model_class == theirs.model_class
    assert spec_of(mine.build_tiny()) is mine
    assert {spec_of(released(model)).name for model in theirs.released} == {rival}
