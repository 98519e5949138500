"""OneAtATime has one component on the device at a time, moves each once an image, and changes no value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hasten.core.errors import InvalidSetting, NotEngaged, Refused
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.memory import OneAtATime
from hasten.memory.engine.moving import Moved
from hasten.memory.engine.sizes import in_words
from hasten.memory.engine.weights import all_tensors, size_of
from tests.contract.rigs import ARCHITECTURES, Rig, fingerprint, make, plain_output
from tests.memory.simulated import simulated, units, watching

TECHNIQUE = OneAtATime(device="cpu")


class Encoder(nn.Module):
    """Stands for a text encoder: run before denoising."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            text = layer(text)
        return text


def with_encoder(architecture: str = "flux") -> Rig:
    rig = make(architecture)
    torch.manual_seed(3)
    rig.components = {"text_encoder": Encoder(), **rig.components}
    return rig


def image(rig: Rig, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        encoded = rig.components["text_encoder"](torch.ones(2, 64))
    return torch.cat([encoded.flatten(), rig.run(**options)])


def sizes(rig: Rig) -> dict[str, int]:
    return {name: size_of(module) for name, module in Target.of(rig).modules.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_component_at_a_time_and_each_once_an_image(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, rig = simulated(monkeypatch), with_encoder(architecture)
    plain, before, parts = image(rig), fingerprint(rig), sizes(rig)
    with rig.accelerated(TECHNIQUE) as session:
        with watching(device, units(session, TECHNIQUE)):
            assert torch.equal(image(rig), plain)
            assert (device.copies, device.bytes) == (3, sum(parts.values()))
            assert torch.equal(image(rig), plain)
        assert (device.copies, device.bytes) == (6, 2 * sum(parts.values()))
        assert device.most == max(parts.values())
        ledger = session.state(TECHNIQUE, Moved).ledger
        assert (ledger.moved, ledger.loads, ledger.most) == (device.bytes, device.copies, device.most)
        assert f"{in_words(device.bytes)} brought to cpu in 6 loads" in TECHNIQUE.engaged(session).summary
    assert device.present == 0
    assert fingerprint(rig)[1:] == before[1:]
    assert torch.equal(image(rig), plain)


def test_who_is_there_while_who_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    device, rig = simulated(monkeypatch), with_encoder()
    parts, seen = sizes(rig), dict[str, set[int]]()
    for name, module in Target.of(rig).modules.items():
        leaf = next(part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d))
        if name == "vae":
            leaf = rig.vae.get_submodule("decoder.conv_out")
        leaf.register_forward_hook(lambda *_, name=name: seen.setdefault(name, set()).add(device.present))
    with rig.accelerated(TECHNIQUE):
        image(rig)
        image(rig)
    assert seen == {name: {size} for name, size in parts.items()}


def test_the_prediction_names_what_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = with_encoder()
    workload = Workload(prompts=("a",), steps=4)
    assert TECHNIQUE.cost(Target.of(rig), workload).in_turn == ("text_encoder", "transformer", "vae")
    assert OneAtATime(device="cpu", stay=("vae",)).cost(Target.of(rig), workload).in_turn == (
        "text_encoder",
        "transformer",
    )


def test_what_stays_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    device, rig = simulated(monkeypatch), with_encoder()
    technique, parts, plain = OneAtATime(device="cpu", stay=("text*",)), sizes(rig), image(rig)
    addresses = [tensor.data_ptr() for tensor in all_tensors(rig.components["text_encoder"])]
    with rig.accelerated(technique):
        assert torch.equal(image(rig), plain)
        assert [tensor.data_ptr() for tensor in all_tensors(rig.components["text_encoder"])] == addresses
    assert device.bytes == parts["transformer"] + parts["vae"]


def test_a_controlnet_stays_beside_the_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in every step: taking turns with the denoiser would move both in every step."""
    device, rig = simulated(monkeypatch), with_encoder()
    rig.components["controlnet"] = rig.components.pop("text_encoder")
    with rig.accelerated(TECHNIQUE), torch.no_grad():
        for _ in range(3):
            rig.components["controlnet"](torch.ones(2, 64))
            rig.call(rig.spec.example(rig.denoiser.config, seed=0))  # pyright: ignore
        assert device.copies == 2
        assert device.present == sum(size for name, size in sizes(rig).items() if name != "vae")
        rig.run()
        assert device.present == sizes(rig)["vae"]


def test_a_component_called_inside_another_does_not_send_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    device, rig = simulated(monkeypatch), with_encoder()
    encoder = rig.components["text_encoder"]
    with rig.accelerated(TECHNIQUE) as session:
        handle = rig.vae.decoder.register_forward_pre_hook(_Calls(encoder))  # pyright: ignore
        with watching(device, units(session, TECHNIQUE)):
            assert torch.equal(rig.run(), plain_output("flux"))
        handle.remove()
    assert torch.equal(rig.run(), plain_output("flux"))


class _Calls:
    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *_: object) -> None:
        with torch.no_grad():
            self._module(torch.ones(2, 64))


@pytest.mark.parametrize("where", ["text_encoder", "transformer", "vae"])
def test_an_exception_in_a_component(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, rig = simulated(monkeypatch), with_encoder()
    plain, module = image(rig), Target.of(rig).modules[where]
    leaf = rig.vae.get_submodule("decoder.conv_out") if where == "vae" else next(iter(module.children()))
    leaf = leaf[0] if isinstance(leaf, nn.ModuleList) else leaf
    with rig.accelerated(TECHNIQUE) as session:
        handle = leaf.register_forward_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            image(rig)
        handle.remove()
        with watching(device, units(session, TECHNIQUE)):
            assert torch.equal(image(rig), plain)
        assert device.present == sizes(rig)["vae"]
    assert device.present == 0
    assert torch.equal(image(rig), plain)


def _fail(*_: object) -> None:
    raise ZeroDivisionError


def test_a_pipeline_makes_its_tensors_where_the_components_run() -> None:
    """Weights are at home between calls, so the pipeline must be told; seen with a device that is not the CPU."""
    from diffusers import DiTPipeline

    from hasten.core.clock import Clock
    from hasten.core.patch import Patch
    from hasten.memory.engine.components import say_where

    rig = make("dit")
    pipe: Any = DiTPipeline(rig.denoiser, rig.vae, rig.scheduler)  # pyright: ignore
    patch = Patch({}, Clock)
    say_where(Target.of(pipe), ("transformer", "vae"), torch.device("meta"), patch)
    assert pipe._execution_device == torch.device("meta")
    patch.close()
    assert pipe._execution_device == torch.device("cpu")
    assert "_hf_hook" not in rig.denoiser.__dict__


def test_a_bare_denoiser_is_refused_with_what_helps_instead() -> None:
    import hasten

    with pytest.raises(Refused, match=r"fewer than two components that could take turns; use Offload\(kind='blocks'\)"):
        hasten.accelerate(make("flux").denoiser, TECHNIQUE)


def test_refusals_and_impossible_settings() -> None:
    with pytest.raises(InvalidSetting, match="no amount of memory"):
        OneAtATime(pinned="some")
    with pytest.raises(Refused, match="there is no device cuda:77"):
        with_encoder().accelerated(OneAtATime(device="cuda:77"))
    if not torch.cuda.is_available():
        with pytest.raises(Refused, match="device='cpu' rehearses it"):
            with_encoder().accelerated(OneAtATime())


def test_nothing_moved_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated(monkeypatch)
    with with_encoder().accelerated(TECHNIQUE) as session, pytest.raises(NotEngaged):
        TECHNIQUE.engaged(session)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = with_encoder().to("cuda")
    plain = rig.run()
    rig.to("cpu")
    monkeypatch.setattr(Rig, "device", torch.device("cuda"))  # as a pipeline, which asks where it runs
    with rig.accelerated(OneAtATime()):
        rig.run()
        assert torch.equal(rig.run(), plain)
        assert {tensor.device.type for tensor in all_tensors(rig.denoiser)} == {"cpu"}
        assert {tensor.device.type for tensor in all_tensors(rig.vae)} == {"cuda"}
