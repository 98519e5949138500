"""What both compilers share: sizes, other parts of the pipeline, adapters, warm-up."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch

import hasten
from hasten.compilation import CompileBlocks, CompileWhole, warm_up
from hasten.compilation.compiler import CompileCounter
from hasten.compilation.parts import repeated_layers, text_encoders
from hasten.compilation.sizes import ANY, Sizes, extent, input_size
from hasten.core.errors import HastenError, InvalidSetting
from hasten.core.registry import specs
from hasten.core.session import accelerate
from hasten.core.spec import InputSize
from hasten.core.target import Target
from tests.contract.rigs import make

BUCKETS = CompileBlocks(backend="eager", buckets=("128x128", "256x96"))


@pytest.fixture(autouse=True)
def fresh() -> Generator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def call(architecture: str, model: Any, width: int, height: int, text: int = 11) -> torch.Tensor:
    spec = specs()[architecture]
    size = InputSize(width=width // 8, height=height // 8, text_tokens=text)
    return model(**spec.example(model.config, size), return_dict=False)[0]


@pytest.mark.parametrize("architecture", ["flux", "wan", "qwen_image"])
def test_declared_sizes_have_graphs_of_their_own_and_others_share_one(architecture: str) -> None:
    model = specs()[architecture].build_tiny()
    with accelerate(model, BUCKETS) as session:
        counter, sizes = session.state(BUCKETS, CompileCounter), session.state(BUCKETS, Sizes)
        made: list[int] = []
        for width, height in ((128, 128), (256, 96), (128, 128), (160, 128), (224, 128), (320, 96), (256, 96)):
            before = counter.graphs
            call(architecture, model, width, height)
            made.append(counter.graphs - before)
        assert made[0] == made[1] > 0, "each declared size is compiled once"
        assert made[2] == made[6] == 0
        assert made[3] > 0, "the first other size is compiled for any size"
        assert made[4] == made[5] == 0
        assert sizes.calls == {"128x128": 2, "256x96": 2, ANY: 3}
        assert session.evidence()[BUCKETS].summary.endswith("calls: 2 at 128x128, 2 at 256x96, 3 at other sizes")


def test_prompts_of_other_lengths_do_not_multiply_graphs_of_a_declared_size() -> None:
    model = specs()["qwen_image"].build_tiny()
    technique = CompileBlocks(backend="eager", buckets=("128x128",))
    with accelerate(model, technique) as session:
        counter = session.state(technique, CompileCounter)
        for text in (8, 9):
            call("qwen_image", model, 128, 128, text)
        settled = counter.graphs
        assert counter.recompilations >= 1
        for text in (10, 17, 33):
            call("qwen_image", model, 128, 128, text)
        assert counter.graphs == settled
        assert "anew for another size or setting" in session.evidence()[technique].summary


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"buckets": ("1024",)}, "'1024' is no size; write width x height"),
        ({"buckets": ("1023x1024",)}, "must be multiples of 8"),
        ({"buckets": ("64x64",), "dynamic": True}, "buckets settle the sizes"),
        ({"parts": ()}, "name at least one part"),
        ({"parts": ("unet",)}, "expected tuple of one of 'denoiser', 'vae', 'text_encoder'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidSetting, match=words):
        CompileBlocks(**settings)


def test_a_size_that_the_model_cannot_have_is_refused() -> None:
    (reason,) = CompileBlocks(backend="eager", buckets=("8x8",)).problems(Target.of(specs()["flux"].build_tiny()))
    assert reason == "FluxTransformer2DModel has nothing to compute at the size 8x8; declare a larger one."


def test_sizes_in_latents_follow_the_vae() -> None:
    assert input_size("1024x512", Target.of(make("flux").denoiser)) == InputSize(width=128, height=64)
    rig = make("stable_diffusion")  # its VAE does not scale
    assert input_size("1024x512", Target.of(rig)) == InputSize(width=1024, height=512)
    assert extent([torch.zeros(4, 1, 6, 7)]) == (6, 7)
    assert extent(torch.zeros(2, 42, 64)) == (42,)
    assert extent("text") == ()


@pytest.fixture(scope="module")
def emoji() -> Any:
    return hasten.load("emoji-flux", device="cpu").pipeline


def picture(pipeline: Any, size: int = 64) -> Any:
    return pipeline(
        "a red fox", width=size, height=size, num_inference_steps=2, output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.mark.parametrize("kind", [CompileBlocks, CompileWhole])
def test_text_encoders_and_vae_are_compiled_as_well(kind: type[Any], emoji: Any) -> None:
    emoji.set_progress_bar_config(disable=True)
    plain = picture(emoji)
    calls: dict[str, int] = {}
    for part in ("denoiser", "vae", "text_encoder"):
        technique = kind(backend="eager", parts=(part,))
        with accelerate(emoji, technique) as session:
            torch.testing.assert_close(picture(emoji), plain, atol=1e-4, rtol=1e-3)
            calls[part] = session.state(technique, CompileCounter).calls
            wheres = {change.where.partition(".")[0] for change in session.log(technique)}
        expected = {"denoiser": {"transformer"}, "vae": {"vae"}, "text_encoder": {"text_encoder", "text_encoder_2"}}
        assert wheres == expected[part]
    layers = sum(len(list(repeated_layers(encoder))) for _, encoder in text_encoders(Target.of(emoji)))
    assert calls["vae"] == 1
    assert calls["text_encoder"] >= (layers if kind is CompileBlocks else 2)
    assert torch.equal(picture(emoji), plain)


def test_parts_that_are_not_there_are_named() -> None:
    reasons = list(
        CompileWhole(backend="eager", parts=("vae", "text_encoder")).problems(Target.of(make("dit").denoiser))
    )
    assert [reason.partition(";")[0] for reason in reasons] == [
        "DiTTransformer2DModel has no VAE decoder to compile",
        "DiTTransformer2DModel has no text encoder to compile",
    ]


def test_after_a_warm_up_pictures_compile_nothing(emoji: Any) -> None:
    emoji.set_progress_bar_config(disable=True)
    technique = CompileBlocks(backend="eager", buckets=("64x64", "96x64"), parts=("denoiser", "vae"))
    with accelerate(emoji, technique) as session:
        done = warm_up(session)
        assert list(done.seconds) == ["64x64", "96x64"]
        assert all(graphs > 0 for graphs in done.graphs.values())
        assert str(done).startswith("64x64: ")
        before = session.state(technique, CompileCounter).graphs
        picture(emoji)
        assert session.state(technique, CompileCounter).graphs == before


def test_a_bare_denoiser_is_warmed_up_with_inputs_of_its_specification() -> None:
    model = specs()["flux"].build_tiny()
    with accelerate(model, BUCKETS) as session:
        assert set(warm_up(session).graphs) == {"128x128", "256x96"}
        assert session.state(BUCKETS, Sizes).calls == {"128x128": 1, "256x96": 1}
        assert warm_up(session, "192x192").graphs["192x192"] > 0


def test_nothing_to_warm_up() -> None:
    with make("dit").accelerated() as session, pytest.raises(HastenError, match="nothing to warm up"):
        warm_up(session)
