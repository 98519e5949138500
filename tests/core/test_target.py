"""Targets: what is found in a pipeline, a bare denoiser, an offloaded or an only planned model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import accelerate as hf_accelerate
import pytest
import torch
from diffusers import FluxPipeline
from torch import nn

from hasten.cache import FirstBlockCache
from hasten.core.errors import HastenError, UnknownName
from hasten.core.intercept import intercept
from hasten.core.session import accelerate
from hasten.core.target import Target, find_released, released_models, spec_of
from tests.contract.rigs import ARCHITECTURES, make


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_recognised(architecture: str) -> None:
    rig = make(architecture)
    target = Target.of(rig)
    assert target.architecture == architecture
    assert [denoiser.module for denoiser in target.denoisers] == [rig.denoiser]
    assert (target.device.type, target.dtype) == ("cpu", torch.float32)
    assert target.scheduler is rig.scheduler
    assert target.vae is rig.vae


def test_a_bare_denoiser() -> None:
    model = make("dit").denoiser
    target = Target.of(model)
    assert (target.title, target.architecture) == ("DiTTransformer2DModel", "dit")
    assert target.components == {"denoiser": model}
    assert (target.scheduler, target.vae, target.pipeline) == (None, None, None)


def test_an_intercepted_denoiser_is_still_recognised() -> None:
    rig = make("flux")
    intercept(rig.denoiser, "__call__", lambda call, *args, **kwargs: call(*args, **kwargs))
    block = rig.denoiser.get_submodule("transformer_blocks.0")
    intercept(block, "__call__", lambda call, *args, **kwargs: call(*args, **kwargs))
    target = Target.of(rig)
    assert target.architecture == "flux"
    assert target.title == "Rig"
    assert len(list(target.denoisers[0].of_class("FluxTransformerBlock"))) == 3


def test_a_real_pipeline() -> None:
    rig = make("flux")
    build: Any = FluxPipeline
    pipeline = build(
        scheduler=rig.scheduler, vae=rig.vae, transformer=rig.denoiser,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    target = Target.of(pipeline)
    assert (target.title, target.denoisers[0].name) == ("FluxPipeline", "transformer")
    assert sorted(target.modules) == ["transformer", "vae"]
    names = target.names()
    assert names[id(pipeline)] == "pipeline"
    assert names[id(rig.scheduler)] == "scheduler"
    assert names[id(rig.denoiser.get_submodule("transformer_blocks.0.attn"))] == "transformer.transformer_blocks.0.attn"


def test_two_denoisers_of_one_pipeline() -> None:
    one, two = make("wan").denoiser, make("wan").denoiser
    target = Target.of(SimpleNamespace(components={"transformer_2": two, "transformer": one}))
    assert [(denoiser.name, denoiser.module) for denoiser in target.denoisers] == [
        ("transformer", one),
        ("transformer_2", two),
    ]


@pytest.mark.parametrize("subject", [3, "emoji-flux", None, object(), SimpleNamespace(components=[1])])
def test_what_is_no_pipeline(subject: object) -> None:
    with pytest.raises(
        HastenError, match=f"accelerates a diffusers pipeline or a denoiser, not {type(subject).__name__}"
    ):
        Target.of(subject)


def test_a_pipeline_without_a_denoiser() -> None:
    with pytest.raises(HastenError, match="SimpleNamespace has no denoiser"):
        Target.of(SimpleNamespace(components={"vae": nn.Linear(1, 1), "transformer": None}))


def test_a_model_wrapped_by_torch_compile() -> None:
    rig = make("flux")
    wrapped: Any = torch.compile(rig.denoiser, backend="eager")
    for subject, name in ((wrapped, "denoiser"), (SimpleNamespace(components={"transformer": wrapped}), "transformer")):
        with pytest.raises(HastenError, match=rf"The {name} is wrapped by torch.compile.*add CompileBlocks\(\)"):
            Target.of(subject)
    assert Target.of(wrapped._orig_mod).architecture == "flux"


def test_a_network_without_weights() -> None:
    with pytest.raises(HastenError, match="Identity has no weights"):
        accelerate(nn.Identity(), FirstBlockCache())


def test_an_unknown_architecture_refuses_what_needs_its_structure() -> None:
    target = Target.of(nn.Linear(2, 2))
    assert target.architecture == "unknown"
    (sentence,) = FirstBlockCache().problems(target)
    assert sentence == "hasten does not know the blocks of Linear; add a specification for it."


def test_architectures_of_one_class_are_told_apart() -> None:
    for name in ("stable_diffusion", "sdxl"):
        assert spec_of(make(name).denoiser).name == name


def test_weights_that_are_kept_elsewhere_between_calls() -> None:
    rig = make("flux")
    given = rig.spec.example(rig.spec.tiny)
    with torch.no_grad():
        plain = rig.denoiser(**given)[0]
        hf_accelerate.cpu_offload(rig.denoiser, execution_device=torch.device("cpu"))
        assert next(rig.denoiser.parameters()).device.type == "meta"
        assert Target.of(rig.denoiser).device.type == "cpu"
        with accelerate(rig.denoiser, FirstBlockCache(threshold=10.0)) as session:
            assert torch.equal(rig.denoiser(**given)[0], plain)
            rig.denoiser(**given | {"timestep": given["timestep"] / 2})
        assert session.evidence()
        assert torch.equal(rig.denoiser(**given)[0], plain)


def test_released_models_are_planned_without_weights() -> None:
    assert "FLUX.1-dev" in released_models()
    spec, released = find_released("flux.1-dev")
    assert (spec.name, released.steps) == ("flux", 28)
    with pytest.raises(UnknownName, match=r"no released model called 'FLUX.1-de'. Did you mean FLUX.1-dev"):
        Target.planned("FLUX.1-de")
