"""8-bit attention beside FusedBlocks: the pass before attention writes the codes, and the kernel takes them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hasten.attention import EightBitAttention, redirect
from hasten.attention import heads as attention_heads
from hasten.attention.kernels import KERNELS
from hasten.attention.kernels.flash_attention import FLASH3
from hasten.compilation import CompileBlocks, FusedBlocks
from hasten.core.session import Session, accelerate
from hasten.kernels import coded_heads
from hasten.kernels.coded_heads import CARRIED
from tests.attention.fakes import FlashPackage, provide
from tests.compilation.test_fused_blocks import DECLARED, in_half, model_of, output

WHOLE = {"flux", "qwen_image", "sd3", "z_image"}
"""Architectures all of whose attention is declared as norm, rotation and attention to itself."""
REFERENCE = EightBitAttention(kernel="float8_reference", least_keys=0)


@pytest.fixture
def flash3(monkeypatch: pytest.MonkeyPatch) -> FlashPackage:
    """FlashAttention 3 on the CPU: exact attention on what the codes stand for."""
    stand_in = FlashPackage(3)
    provide(monkeypatch, FLASH3.modules[0], stand_in)
    monkeypatch.setitem(KERNELS, "flash3_float8", replace(KERNELS["flash3_float8"], devices=("cpu",), capability=()))
    return stand_in


def words(session: Session, technique: EightBitAttention) -> str:
    return session.evidence()[technique].summary


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", DECLARED)
def test_it_changes_the_picture_as_much_as_rounding_afterwards(name: str, compiled: bool) -> None:
    torch._dynamo.reset()
    model, given = model_of(name)
    plain = output(model, given)
    with accelerate(model, REFERENCE):
        apart = (output(model, given) - plain).norm()
    recipe = REFERENCE | FusedBlocks()
    with accelerate(model, recipe | CompileBlocks(backend="aot_eager") if compiled else recipe) as session:
        taken = (output(model, given) - plain).norm()
        said = words(session, REFERENCE)
    assert 0 < taken < 1.5 * apart
    assert ("of them took codes from the pass before" in said) == (name in {*WHOLE, "wan"})
    count = said.split()[0]
    assert said.startswith(f"{count} attention calls went to the float8_reference kernel;")
    assert (f"{count} of them took codes" in said) == (name in WHOLE)
    assert said.endswith("; 0 stayed as they were")
    assert torch.equal(output(model, given), plain)


@pytest.mark.parametrize("compiled", [False, True])
def test_flash_attention_gets_the_codes_as_they_were_written(
    flash3: FlashPackage, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    torch._dynamo.reset()
    written: list[coded_heads.CodedHeads] = []

    def recorded(*given: Any) -> coded_heads.CodedHeads:
        written.append(coded_heads.code_heads(*given))
        return written[-1]

    monkeypatch.setattr(attention_heads, "code_heads", recorded)
    model, given = model_of("flux")
    plain = output(model, given)
    technique = EightBitAttention(kernel="flash3_float8", least_keys=0)
    recipe = technique | FusedBlocks()
    with accelerate(model, recipe | CompileBlocks(backend="aot_eager") if compiled else recipe) as session:
        found = output(model, given)
        assert "6 of them took codes from the pass before; 0 stayed" in words(session, technique)
    assert 0 < (found - plain).norm() < 0.05 * plain.norm()
    assert len(flash3.seen) == len(written) == 6
    for (kind, asked), codes in zip(flash3.seen, written, strict=True):
        assert (kind, asked["dtype"]) == ("dense", torch.float8_e4m3fn)
        scales = [asked[f"{part}_descale"] for part in "qkv"]
        assert torch.equal(torch.stack(scales), codes.scales)
        assert [scale.shape for scale in scales] == [(2, 2)] * 3


def test_the_first_call_measures_and_the_next_take_codes(flash3: FlashPackage) -> None:
    model, given = model_of("flux")
    model.to(torch.bfloat16)
    given = {key: value if key == "timestep" else in_half(value) for key, value in given.items()}
    technique = EightBitAttention(least_keys=0)
    with accelerate(model, technique | FusedBlocks()) as session:
        output(model, given)
        said = words(session, technique)
    assert said.startswith("6 attention calls went to the kernel that measured fastest")
    assert "flash3_float8 (flash3_float8 " in said
    assert "; 5 of them took codes from the pass before; 0 stayed" in said


def unfit_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "float8_reference", replace(KERNELS["float8_reference"], codes_size=32))


def none_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "float8_reference", replace(KERNELS["float8_reference"], codes=None))


@pytest.mark.parametrize("obstacle", [unfit_size, none_taken])
@pytest.mark.parametrize("compiled", [False, True])
def test_kernels_that_take_no_codes_are_called_as_ever(
    obstacle: Callable[[pytest.MonkeyPatch], None], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    obstacle(monkeypatch)
    model, given = model_of("flux")
    recipe = REFERENCE | FusedBlocks()
    with accelerate(model, recipe | CompileBlocks(backend="aot_eager") if compiled else recipe) as session:
        output(model, given)
        assert words(session, REFERENCE) == (
            "6 attention calls went to the float8_reference kernel; 0 stayed as they were"
        )


@pytest.mark.parametrize("compiled", [False, True])
def test_few_keys_stay_as_they_are(compiled: bool) -> None:
    torch._dynamo.reset()
    model, given = model_of("z_image")  # its refiners of the text see fewer tokens than the others
    with accelerate(model, REFERENCE | FusedBlocks()) as session:
        output(model, given)
        every = {call.keys for _, call in session.state(REFERENCE, redirect.Counted).eager}
    technique = replace(REFERENCE, least_keys=max(every))
    plain = accelerate(model, technique | FusedBlocks() | CompileBlocks(backend="aot_eager") if compiled else
                       technique | FusedBlocks())  # fmt: skip
    with plain as session:
        output(model, given)
        said = words(session, technique)
    taken, left = (int(part.split()[0]) for part in said.split("; ")[1:])
    assert taken > 0
    assert left > 0


def test_masks_and_other_back_ends_are_left_alone() -> None:
    model, given = model_of("z_image")
    given["cap_feats"] = [given["cap_feats"][0], torch.randn(40, 16)]
    with accelerate(model, REFERENCE | FusedBlocks()) as session:
        output(model, given)
        said = words(session, REFERENCE)
    assert int(said.split("; ")[1].split()[0]) < int(said.split()[0]), "masked calls take no codes"
    model, given = model_of("flux")
    model.transformer_blocks[0].attn.processor._attention_backend = "native"  # pyright: ignore
    with accelerate(model, REFERENCE | FusedBlocks()) as session:
        output(model, given)
        assert "5 of them took codes" in words(session, REFERENCE)


def test_training_needs_gradients_which_codes_have_not() -> None:
    model, given = model_of("flux")
    with accelerate(model, REFERENCE | FusedBlocks()):
        found: torch.Tensor = model(**given, return_dict=False)[0]
        found.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("to_q.weight"))


def test_copies_do_not_carry_it() -> None:
    model, given = model_of("flux")
    plain = output(model, given)
    with accelerate(model, REFERENCE | FusedBlocks()):
        attention: Any = model.transformer_blocks[0].attn  # pyright: ignore
        assert getattr(attention, CARRIED)
        for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
            assert getattr(other, CARRIED) is None
        copied = copy.deepcopy(model)
    assert not hasattr(attention, CARRIED)
    with accelerate(copied, "FusedBlocks()"):
        assert torch.allclose(output(copied, given), plain, atol=1e-5)


def test_the_redirecting_mode_is_not_asked_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    handle = redirect._Redirect.__torch_function__

    def counted(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked.append(func)
        return handle(self, func, types, args, kwargs)

    def coded(*given: Any) -> coded_heads.CodedHeads:
        before = len(asked)
        found = coded_heads.code_heads(*given)
        assert len(asked) == before
        return found

    monkeypatch.setattr(redirect._Redirect, "__torch_function__", counted)
    monkeypatch.setattr(attention_heads, "code_heads", coded)
    model, given = model_of("flux")
    with accelerate(model, REFERENCE | FusedBlocks()) as session:
        output(model, given)
        assert "6 of them took codes" in words(session, REFERENCE)
    assert asked
