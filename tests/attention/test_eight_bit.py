"""EightBitAttention: the calls it takes, what it leaves alone, and that it says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hasten.attention import AttentionBackend, EightBitAttention
from hasten.attention.kernels import KERNELS, LOSSY
from hasten.compilation import CompileBlocks
from hasten.core.errors import NotEngaged, Refused
from hasten.core.session import accelerate
from tests.attention.test_backend import Counting, arguments, output, pixart_mask
from tests.contract.rigs import ARCHITECTURES, make


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_picture_changes_a_little_and_comes_back(architecture: str) -> None:
    rig, technique = make(architecture), EightBitAttention(kernel="float8_reference", least_keys=0)
    given = arguments(rig)
    with Counting() as counting:
        expected = output(rig, given)
    with accelerate(rig, technique) as session:
        found = output(rig, given)
        said = session.evidence()[technique].summary
    assert said == f"{counting.calls} attention calls went to the float8_reference kernel; 0 stayed as they were"
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(output(rig, given), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_few_keys_stay_as_they_are(compiled: bool) -> None:
    torch._dynamo.reset()
    rig, technique = make("pixart"), EightBitAttention(kernel="float8_reference", least_keys=32)
    recipe = technique | CompileBlocks(backend="eager") if compiled else technique
    with accelerate(rig, recipe) as session:
        output(rig, arguments(rig))
        self_attention = cross_attention = len(rig.denoiser.transformer_blocks)  # pyright: ignore
        said = session.evidence()[technique].summary
    assert said.startswith(f"{self_attention} attention calls went")
    assert said.endswith(f"; {cross_attention} stayed as they were")


def test_calls_that_the_kernel_cannot_take_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, "float8_reference", replace(KERNELS["float8_reference"], masks="no"))
    rig, technique = make("pixart"), EightBitAttention(kernel="float8_reference", least_keys=0)
    blocks = len(rig.denoiser.transformer_blocks)  # pyright: ignore
    with accelerate(rig, technique) as session:
        output(rig, arguments(rig) | pixart_mask(rig))
        assert session.evidence()[technique].summary.endswith(f"; {blocks} stayed as they were")
    with accelerate(rig, replace(technique, least_keys=10**6)) as session:
        output(rig, arguments(rig))
        with pytest.raises(NotEngaged, match=f"on 8-bit numbers \\({2 * blocks} stayed as they were"):
            session.evidence()


def test_auto_takes_an_8bit_kernel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    run = KERNELS["float8_reference"].run
    fake = replace(KERNELS["sage"], run=run, devices=("cpu",), package=None, masks="yes", capability=())
    monkeypatch.setitem(KERNELS, "sage", fake)
    rig, technique = make("flux"), EightBitAttention(least_keys=0)
    rig.denoiser.to(torch.bfloat16)
    given = {name: part.bfloat16() for name, part in arguments(rig).items()}
    with accelerate(rig, technique) as session:
        output(rig, given)
        said = session.evidence()[technique].summary
    assert "sage (sage " in said
    assert said.endswith("; 0 stayed as they were")


def test_refusals_name_what_is_missing() -> None:
    with pytest.raises(Refused) as caught:
        accelerate(make("flux"), EightBitAttention())
    assert str(caught.value) == (
        "EightBitAttention: no 8-bit attention kernel runs here: the flash3_float8 kernel runs on cuda, not on cpu; "
        "the sage kernel runs on cuda, not on cpu. To see its effect, use kernel='float8_reference'."
    )
    with pytest.raises(Refused, match="the sage kernel runs on cuda, not on cpu; usable here: float8_reference."):
        accelerate(make("flux"), EightBitAttention(kernel="sage"))
    with pytest.raises(Refused, match="AttentionBackend and EightBitAttention both take the choice of the attention"):
        accelerate(make("flux"), AttentionBackend("math") | EightBitAttention(kernel="float8_reference"))


def test_every_kernel_can_be_asked_for() -> None:
    from typing import get_args, get_type_hints

    from hasten.attention.kernels import LOSSLESS

    assert set(get_args(get_type_hints(AttentionBackend)["name"])) == {"auto", *LOSSLESS}
    assert set(get_args(get_type_hints(EightBitAttention)["kernel"])) == {"auto", *LOSSY}
