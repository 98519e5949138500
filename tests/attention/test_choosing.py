"""AttentionBackend("auto"): every usable kernel is checked and timed, the fastest right one taken and remembered."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hasten.attention import AttentionBackend, LowerTriangular, attend, choosing, remembered
from hasten.attention.call import AttentionCall
from hasten.attention.kernels import KERNELS
from hasten.attention.kernels.base import Run
from hasten.compilation import CompileBlocks
from hasten.core.errors import Refused
from hasten.core.session import accelerate
from tests.attention.test_backend import Counting, arguments, output
from tests.contract.rigs import ARCHITECTURES, make

plain: Run = KERNELS["flash"].run


class Kernels:
    """Puts kernels with known faults and speeds in place of those that need a GPU, and counts their runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.runs: dict[str, int] = {}

    def put(self, name: str, change: Callable[[torch.Tensor], torch.Tensor], seconds: float = 0.0) -> None:
        def run(*given: Any) -> torch.Tensor:
            self.runs[name] = self.runs.get(name, 0) + 1
            time.sleep(seconds)
            return change(plain(*given))

        facts: dict[str, Any] = {"devices": ("cpu",), "dtypes": (), "capability": (), "package": None, "probe": None}
        self._monkeypatch.setitem(KERNELS, name, replace(KERNELS[name], run=run, **facts))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    found = Kernels(monkeypatch)
    found.put("flash", lambda x: x, 0.004)
    found.put("cudnn", lambda x: x, 0.001)
    return found


def fail(found: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("launch failed")


def tensors(tokens: int = 40) -> list[torch.Tensor]:
    return [torch.randn(1, 2, tokens, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def choice(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> choosing.Choice:
    return choosing.chosen("auto", AttentionCall.of(q, k, v, None, 0.0), q, k, v, None, 0.0, None)


def written() -> dict[str, Any]:
    return json.loads(remembered.place().read_text())["choices"]


def test_the_fastest_right_kernel_is_taken_and_the_others_have_reasons(kernels: Kernels) -> None:
    kernels.put("flash2", lambda x: x * torch.nan)
    kernels.put("flash3", lambda x: x * 1.05)
    kernels.put("flash4", fail)
    kernels.put("efficient", lambda x: x[:, :, 1:])
    found = choice(*tensors())
    assert found.kernel in ("cudnn", "math")
    trials = {trial.kernel: trial for trial in found.trials}
    assert trials["flash"].milliseconds > trials["cudnn"].milliseconds >= 1  # pyright: ignore
    assert trials["cudnn"].error < 1e-5  # pyright: ignore
    assert trials["flash2"].problem == "its result holds NaN or infinity"
    assert trials["flash3"].problem == "its error of 0.05 is above 0.001"
    assert trials["flash4"].problem == "RuntimeError: launch failed"
    assert trials["efficient"].problem
    assert trials["xformers"].problem == "the xformers kernel runs on cuda, not on cpu"
    assert set(trials) == set(choosing.CHOICES["auto"].names)


def test_a_choice_is_remembered_for_device_versions_and_shapes(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "_MATH_BYTES", 0)
    assert choice(*tensors()).kernel == "cudnn"
    runs = dict(kernels.runs)
    choosing.forget()
    recalled = choice(*tensors())
    assert recalled.recalled
    assert recalled.kernel == "cudnn"
    assert recalled.trials
    assert kernels.runs == runs, "a remembered choice was measured again"
    choice(*tensors(41))
    assert kernels.runs != runs
    runs = dict(kernels.runs)
    choosing.forget()
    monkeypatch.setattr(remembered, "_versions", lambda: "torch 99")
    choice(*tensors())
    assert kernels.runs != runs, "another version must be measured anew"
    assert len(written()) == 3


def test_a_remembered_kernel_that_is_gone_is_not_used(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "_MATH_BYTES", 0)
    assert choice(*tensors()).kernel == "cudnn"
    choosing.forget()
    monkeypatch.setitem(KERNELS, "cudnn", replace(KERNELS["cudnn"], devices=("cuda",)))
    assert choice(*tensors()).kernel == "flash"


DAMAGED = (
    "{",
    "[]",
    '{"format": 2, "choices": []}',
    '{"format": 99, "choices": {}}',
    '{"format": 2, "choices": {"KEY": {"kernel": 3}}}',
    '{"format": 2, "choices": {"KEY": {"kernel": "math", "trials": [{}]}}}',
)


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.filterwarnings("ignore:.*is not read")
def test_a_damaged_file_is_measured_over(kernels: Kernels, content: str) -> None:
    q, k, v = tensors()
    key = remembered._key("auto", AttentionCall.of(q, k, v, None, 0.0))
    remembered.place().parent.mkdir(parents=True)
    remembered.place().write_text(content.replace("KEY", key))
    assert choice(q, k, v).trials
    assert key in written()


def test_a_file_that_cannot_be_written_only_warns(kernels: Kernels) -> None:
    remembered.place().parent.parent.mkdir(parents=True, exist_ok=True)
    remembered.place().parent.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be remembered"):
        assert choice(*tensors()).kernel


def test_when_nothing_can_be_timed_a_sound_kernel_serves(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "capturing", lambda device: True)
    found = choice(*tensors())
    assert found.kernel == "flash"
    assert not any(trial.milliseconds for trial in found.trials)
    assert not remembered.place().exists(), "what was not measured is not to be remembered"


def test_when_nothing_works_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in choosing.CHOICES["auto"].names:
        monkeypatch.setitem(KERNELS, name, replace(KERNELS[name], devices=("mars",)))
    with pytest.raises(Refused) as caught:
        choice(*tensors())
    assert "No attention kernel can serve 40 tokens, 2 heads x 16." in caught.value.reasons
    assert "the math kernel runs on mars, not on cpu." in caught.value.reasons


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_session_says_what_was_tried(architecture: str) -> None:
    rig, technique = make(architecture), AttentionBackend("auto")
    given = arguments(rig)
    with Counting() as counting:
        expected = output(rig, given)
    with accelerate(rig, technique) as session:
        torch.testing.assert_close(output(rig, given), expected, atol=2e-5, rtol=1e-4)
        text = session.describe()
    assert f"{counting.calls} attention calls went to the kernel that measured fastest" in text
    assert " tokens, 2 heads x " in text
    assert "math 0." in text
    assert "flash 0." in text
    assert torch.equal(output(rig, given), expected)


def test_self_and_cross_attention_may_get_different_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, technique = make("pixart"), AttentionBackend()

    def slow_across(*given: Any) -> torch.Tensor:
        time.sleep(0.01 if given[0].shape[2] != given[1].shape[2] else 0)
        return plain(*given)

    def slow_within(*given: Any) -> torch.Tensor:
        time.sleep(0.01 if given[0].shape[2] == given[1].shape[2] else 0)
        return plain(*given)

    for name, run in (("flash", slow_across), ("math", slow_within)):
        monkeypatch.setitem(KERNELS, name, replace(KERNELS[name], run=run))
    with accelerate(rig, technique) as session:
        output(rig, arguments(rig))
        text = session.evidence()[technique].summary
    picked = {part.partition(" tokens")[2].partition(",")[0]: part for part in text.split("; ")[1:]}
    assert ": flash (" in picked[""]
    assert ": math (" in picked[" to 8"]


def test_compiled_blocks_choose_too() -> None:
    torch._dynamo.reset()
    rig, technique = make("dit"), AttentionBackend("auto")
    given = arguments(rig)
    with Counting() as counting:
        expected = output(rig, given)
    with accelerate(rig, technique | CompileBlocks(backend="eager")) as session:
        for runs in (1, 2):
            torch.testing.assert_close(output(rig, given), expected, atol=2e-5, rtol=1e-4)
            assert session.evidence()[technique].summary.startswith(f"{runs * counting.calls} attention calls")


def test_attend_chooses_too(kernels: Kernels) -> None:
    q, k, v = (part.transpose(1, 2) for part in tensors())
    attend(q, k, v, LowerTriangular(), backend="auto")
    assert "LowerTriangular" in next(iter(written()))
