"""AttentionBackend: every attention call of the denoiser, the same picture, and nothing outside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from hasten.attention import AttentionBackend
from hasten.attention.kernels import KERNELS, LOSSLESS
from hasten.compilation import CompileBlocks
from hasten.compilation.compiler import CompileCounter
from hasten.core.errors import NotEngaged, Refused
from hasten.core.session import Session, accelerate
from hasten.core.spec import InputSize
from hasten.core.target import Target
from tests.contract.rigs import ARCHITECTURES, Rig, make

ON_CPU = tuple(name for name in LOSSLESS if "cpu" in KERNELS[name].devices)
NOT_ON_CPU = tuple(name for name in LOSSLESS if name not in ON_CPU)


class Counting(TorchFunctionMode):
    """Counts attention calls wherever they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.masks = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls += 1
            self.masks += named.get("attn_mask") is not None
        return func(*args, **named)


def arguments(rig: Rig, **more: Any) -> dict[str, Any]:
    return rig.spec.example(rig.spec.tiny, InputSize(batch=2, text_tokens=8)) | more


@torch.no_grad()
def output(rig: Rig, given: dict[str, Any]) -> torch.Tensor:
    found = rig.denoiser(**given, return_dict=False)[0]
    return torch.stack(found) if isinstance(found, list) else found


def count(session: Session, technique: AttentionBackend) -> int:
    return int(technique.engaged(session).summary.split()[0])


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_call_of_every_architecture_is_reached(architecture: str, name: str) -> None:
    rig, technique = make(architecture), AttentionBackend(name=name)  # pyright: ignore
    given = arguments(rig)
    with Counting() as plain:
        expected = output(rig, given)
    assert plain.calls
    with accelerate(rig, technique) as session:
        found = output(rig, given)
        assert count(session, technique) == plain.calls
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(output(rig, given), expected)


def pixart_mask(rig: Rig) -> dict[str, Any]:
    return {"encoder_attention_mask": torch.tensor([[1] * 8, [1] * 3 + [0] * 5])}


def qwen_mask(rig: Rig) -> dict[str, Any]:
    return {"encoder_hidden_states_mask": torch.tensor([[True] * 8, [True] * 3 + [False] * 5])}


def unet_mask(rig: Rig) -> dict[str, Any]:
    return {"encoder_attention_mask": torch.tensor([[1] * 8, [1] * 3 + [0] * 5])}


MASKS: dict[str, Callable[[Rig], dict[str, Any]]] = {
    "pixart": pixart_mask,
    "qwen_image": qwen_mask,
    "stable_diffusion": unet_mask,
}


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("architecture", MASKS)
def test_masks_are_obeyed(architecture: str, name: str) -> None:
    rig = make(architecture)
    given = arguments(rig)
    masked = given | MASKS[architecture](rig)
    with Counting() as plain:
        expected = output(rig, masked)
    assert plain.masks, "the mask must reach attention"
    unmasked = output(rig, given)
    assert (expected[1] - unmasked[1]).abs().max() > 1e-3, "the mask must matter"
    with accelerate(rig, AttentionBackend(name=name)):  # pyright: ignore
        torch.testing.assert_close(output(rig, masked), expected, atol=2e-5, rtol=1e-4)


def flags() -> list[bool]:
    names = ("flash", "math", "mem_efficient", "cudnn")
    return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names]


@pytest.mark.parametrize("name", ON_CPU)
def test_nothing_changes_outside_the_model(name: str) -> None:
    rig, bystander = make("flux"), make("flux")
    given = arguments(rig)
    expected, before, function = output(bystander, given), flags(), F.scaled_dot_product_attention
    with accelerate(rig, AttentionBackend(name=name)) as session:  # pyright: ignore
        output(rig, given)
        assert flags() == before
        assert F.scaled_dot_product_attention is function
        counted = session.describe()
        assert torch.equal(output(bystander, given), expected)
        assert session.describe() == counted, "a call of another model was counted"
    assert flags() == before


def test_an_error_inside_attention_leaves_no_mode_behind() -> None:
    rig = make("flux")
    before = flags()
    with accelerate(rig, AttentionBackend(name="math")), Counting() as counting:
        given = arguments(rig)
        with pytest.raises(RuntimeError):
            output(rig, given | {"img_ids": given["img_ids"][:-1]})
        ones = torch.ones(1, 1, 2, 4)
        assert torch.equal(F.scaled_dot_product_attention(ones, ones, ones), ones)
    assert counting.calls
    assert flags() == before


@pytest.mark.parametrize("name", NOT_ON_CPU)
def test_kernels_for_other_devices_are_refused_in_plain_words(name: str) -> None:
    with pytest.raises(Refused) as caught:
        accelerate(make("flux"), AttentionBackend(name=name))  # pyright: ignore
    sentence = f"AttentionBackend: the {name} kernel runs on cuda, not on cpu; usable here: math, flash, flex."
    assert str(caught.value) == sentence


def test_types_that_a_kernel_lacks_are_refused() -> None:
    cuda, meta = torch.device("cuda"), torch.device("meta")
    sentence = "the flash kernel needs float16 or bfloat16 on a GPU, not float32"
    assert KERNELS["flash"].problem(cuda, torch.float32) == sentence
    assert KERNELS["flash"].problem(cuda, torch.bfloat16) is None
    assert KERNELS["math"].problem(cuda, torch.float32) is None
    assert KERNELS["cudnn"].problem(meta, torch.float32) is None


def test_an_unknown_architecture_is_refused() -> None:
    (sentence,) = AttentionBackend().problems(Target.of(torch.nn.Linear(2, 2)))
    assert sentence == "hasten does not know the attention modules of Linear."


@pytest.mark.parametrize(("architecture", "backend"), [("dit", "eager"), ("wan", "aot_eager")])
def test_compiled_blocks_reach_the_kernel_and_are_counted(architecture: str, backend: str) -> None:
    torch._dynamo.reset()
    rig, technique, compiled = make(architecture), AttentionBackend(name="math"), CompileBlocks(backend=backend)
    given = arguments(rig)
    with Counting() as plain:
        expected = output(rig, given)
    with accelerate(rig, technique | compiled) as session:
        for runs in (1, 2, 3):
            torch.testing.assert_close(output(rig, given), expected, atol=2e-5, rtol=1e-4)
            assert count(session, technique) == runs * plain.calls
        assert session.state(compiled, CompileCounter).graphs


def test_the_kernel_that_diffusers_was_told_to_use_is_overruled() -> None:
    rig, technique = make("flux"), AttentionBackend(name="flash")
    model: Any = rig.denoiser
    model.set_attention_backend("_native_math")
    given = arguments(rig)
    with Counting() as plain:
        expected = output(rig, given)
    with accelerate(rig, technique) as session:
        torch.testing.assert_close(output(rig, given), expected, atol=2e-5, rtol=1e-4)
        assert count(session, technique) == plain.calls
    assert {block.attn.processor._attention_backend for block in model.transformer_blocks} == {"_native_math"}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_kernel_of_diffusers_that_bypasses_pytorch_is_not_taken_for_ours() -> None:
    rig, technique = make("flux"), AttentionBackend(name="math")
    model: Any = rig.denoiser
    model.set_attention_backend("flex")
    with accelerate(rig, technique) as session:
        output(rig, arguments(rig))
        with pytest.raises(NotEngaged, match="no attention call reached the math kernel"):
            session.evidence()
