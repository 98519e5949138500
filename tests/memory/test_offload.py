"""Offload changes no value, brings in what runs and nothing else, counts what it moves, and gives everything back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hasten
from hasten.cache import FORA, FirstBlockCache, OutputForecast
from hasten.core.errors import InvalidSetting, NotEngaged, Refused
from hasten.core.target import Target
from hasten.core.technique import Technique
from hasten.core.workload import Workload
from hasten.memory import ModulationTable, Offload, OneAtATime
from hasten.memory.engine import storage
from hasten.memory.engine.moving import Moved
from hasten.memory.engine.sizes import in_words
from hasten.memory.engine.table import timed_linears
from hasten.memory.engine.weights import all_tensors, size_of
from tests.contract.rigs import ARCHITECTURES, Rig, fingerprint, make, plain_output
from tests.memory.simulated import Device, copied, simulated, units, watching

VARIANTS = (
    Offload(kind="model", device="cpu"),
    Offload(kind="blocks", device="cpu"),
    Offload(kind="blocks", group=2, ahead=2, device="cpu"),
    Offload(kind="blocks", ahead=0, device="cpu"),
    Offload(kind="leaf", device="cpu"),
    Offload(kind="leaf", ahead=3, device="cpu"),
)
BLOCKS = Offload(kind="blocks", device="cpu")


def values(rig: Rig) -> list[torch.Tensor]:
    return [tensor.detach().clone() for part in (rig.denoiser, rig.vae) for tensor in all_tensors(part)]


def addresses(rig: Rig) -> list[int]:
    return [tensor.data_ptr() for part in (rig.denoiser, rig.vae) for tensor in all_tensors(part)]


def tried() -> list[tuple[Offload, str]]:
    """All variants on a U-Net and a transformer with two streams, two in turn on each of the others."""
    whole = ("flux", "stable_diffusion")
    found = [(technique, architecture) for architecture in whole for technique in VARIANTS]
    others = [architecture for architecture in ARCHITECTURES if architecture not in whole]
    turns = [(VARIANTS[turn % 6], VARIANTS[(turn + 4) % 6]) for turn in range(len(others))]
    return found + [(one, name) for name, pair in zip(others, turns, strict=True) for one in pair]


@pytest.mark.parametrize(("technique", "architecture"), tried(), ids=str)
def test_values_are_those_of_the_plain_pipeline_and_nothing_runs_with_weights_elsewhere(
    technique: Offload, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, rig = simulated(monkeypatch), make(architecture)
    before, where, kept = fingerprint(rig), addresses(rig), values(rig)
    with rig.accelerated(technique) as session:
        moving = units(session, technique)
        assert sum(unit.bytes for unit in moving) == size_of(rig.denoiser) + size_of(rig.vae)
        with watching(device, moving):
            assert torch.equal(rig.run(), plain_output(architecture))
            assert torch.equal(rig.run(steps=3, prompt=1), plain_output(architecture, steps=3, prompt=1))
        ledger = session.state(technique, Moved).ledger
        assert (ledger.moved, ledger.loads, ledger.most) == (device.bytes, device.copies, device.most)
        assert ledger.present == device.present
        summary = technique.engaged(session).summary
        assert f"{in_words(device.bytes)} brought to cpu in {device.copies} loads" in summary
        assert f"at most {in_words(device.most)} of {in_words(ledger.managed)}" in summary
    assert device.present == 0
    assert fingerprint(rig)[1:] == before[1:]
    assert addresses(rig) == where, "host memory was never the user's own"
    assert all(torch.equal(one, other) for one, other in zip(values(rig), kept, strict=True))
    assert torch.equal(rig.run(), plain_output(architecture))


def test_smaller_pieces_need_less_memory_and_the_prediction_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    most: dict[str, int] = {}
    for technique in (*VARIANTS[:2], VARIANTS[4]):
        device, rig = simulated(monkeypatch), make("flux")
        target = Target.of(rig)
        predicted = technique.cost(target, Workload(prompts=("a",), steps=4))
        with rig.accelerated(technique):
            rig.run()
            rig.run()
        most[technique.kind] = device.most
        by_component = [predicted.held.get(name, size_of(module)) for name, module in target.modules.items()]
        assert device.most == max(by_component) or technique.kind == "leaf"
        assert device.most <= max(by_component)
    assert most["leaf"] < most["blocks"] < most["model"]


def test_what_is_predicted_to_move_in_each_call_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    device, rig = simulated(monkeypatch), make("flux")
    predicted = BLOCKS.cost(Target.of(rig), Workload(prompts=("a",), steps=4)).moved["transformer"]
    with rig.accelerated(BLOCKS) as session:
        moved = Calls(rig, device)
        rig.run()
        rest = next(unit for unit in units(session, BLOCKS) if unit.lasting and unit.name == "transformer").bytes
    assert moved.bytes == [predicted + rest, predicted, predicted, predicted]


class Calls:
    """Watches the calls of the denoiser: bytes and units copied in each."""

    def __init__(self, rig: Rig, device: Device) -> None:
        self.bytes: list[int] = []
        self.logs: list[list[int]] = []
        call: Callable[..., Any] = rig.call

        def watched(arguments: dict[str, Any]) -> Any:
            bytes_before, log_before = device.bytes, len(device.log)
            output = call(arguments)
            self.bytes.append(device.bytes - bytes_before)
            self.logs.append(device.log[log_before:])
            return output

        rig.call = watched


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize(
    ("kind", "cache"),
    [
        ("blocks", FirstBlockCache(threshold=1e9)),
        ("leaf", FirstBlockCache(threshold=1e9)),
        ("blocks", OutputForecast(interval=2)),
        ("leaf", OutputForecast(interval=2)),
        ("leaf", FORA(interval=2)),
    ],
)
def test_what_a_cache_leaves_out_moves_nothing(
    cache: Technique, kind: str, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _cached_alone(cache)
    device, rig = simulated(monkeypatch), make("flux")
    technique = Offload.build({"kind": kind, "ahead": ahead, "device": "cpu"})
    with rig.accelerated(technique, cache) as session:
        moving = units(session, technique)
        names = {unit.weights[0].home.data_ptr(): unit.name for unit in moving}
        calls = Calls(rig, device)
        with watching(device, moving):
            assert torch.equal(rig.run(steps=6), expected)
        everything = sum(unit.bytes for unit in moving if not unit.lasting and unit.name.startswith("transformer"))
        assert session.state(technique, Moved).ledger.in_vain == 0
        reused = session.evidence()[cache].reused_steps
    assert reused
    few = [[names[a] for a in log] for log, size in zip(calls.logs, calls.bytes, strict=True) if size < everything]
    assert len(few) == reused
    for brought in few:
        if isinstance(cache, OutputForecast):
            assert not brought
        elif isinstance(cache, FirstBlockCache):
            assert not [name for name in brought if "_blocks." in name and "transformer_blocks.0." not in f"{name}."]
        elif kind == "leaf":
            assert not [name for name in brought if ".attn." in name or ".ff." in name]


def _cached_alone(cache: Technique) -> torch.Tensor:
    rig = make("flux")
    with rig.accelerated(cache):
        return rig.run(steps=6)


def test_the_next_blocks_are_fetched_ahead_once_their_order_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    device, rig = simulated(monkeypatch), make("flux")
    with rig.accelerated(BLOCKS) as session:
        blocks = [unit for unit in units(session, BLOCKS) if "_blocks." in unit.name]
        rig.run(steps=1)
        ledger = session.state(BLOCKS, Moved).ledger
        assert ledger.ahead == 0, "nothing is known before the first call"
        started = len(device.log)
        rig.run(steps=3)
        assert ledger.ahead == 3 * (len(blocks) - 1)
        assert ledger.in_vain == 0
        brought = copied(device, units(session, BLOCKS))[started:]
    order = [name for name in brought if "_blocks." in name]
    assert order == 3 * [unit.name for unit in blocks], "each once a call, in the order of the network"


def test_fetched_in_vain_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that takes another way than the call before costs a copy, never the result."""
    simulated(monkeypatch)
    rig = make("flux")
    block: Any = rig.denoiser.get_submodule("single_transformer_blocks.1")
    with rig.accelerated(BLOCKS) as session:
        rig.run()
        removed = list(rig.denoiser.get_submodule("single_transformer_blocks").children())
        rig.denoiser.single_transformer_blocks = nn.ModuleList([one for one in removed if one is not block])  # pyright: ignore
        rig.run(steps=1)
        ledger = session.state(BLOCKS, Moved).ledger
        size = size_of(block)
        assert ledger.in_vain == size
        assert f"{in_words(size)} in vain" in BLOCKS.engaged(session).summary


def test_weights_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, rig = simulated(monkeypatch), make("flux")
    technique, kept = Offload(kind="blocks", device="cpu", disk=str(tmp_path)), values(rig)
    with rig.accelerated(technique) as session:
        moving = units(session, technique)
        files = list(tmp_path.rglob("*.safetensors"))
        assert len(files) == len(moving)
        on_disk = session.state(technique, Moved).storage.on_disk
        assert on_disk <= sum(file.stat().st_size for file in files)
        with watching(device, moving):
            assert torch.equal(rig.run(), plain_output("flux"))
        assert session.state(technique, Moved).ledger.moved == device.bytes
        assert f"{in_words(on_disk)} on disk" in technique.engaged(session).summary
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(one, other) for one, other in zip(values(rig), kept, strict=True))
    assert torch.equal(rig.run(), plain_output("flux"))


def test_files_are_read_not_remembered(tmp_path: Path) -> None:
    """The weights in host memory are let go: what is in the files is what is computed with."""
    rig = make("dit")
    technique = Offload(kind="blocks", device="cpu", disk=str(tmp_path))
    weight = rig.denoiser.get_parameter("transformer_blocks.0.ff.net.0.proj.weight")
    before = weight.data_ptr()
    with rig.accelerated(technique):
        assert weight.data_ptr() != before
        mapped = Path("/proc/self/maps")
        assert not mapped.exists() or str(tmp_path) in mapped.read_text("utf-8")


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("kind", ["model", "blocks", "leaf"])
def test_an_exception_in_a_block_leaves_nothing_in_use(
    kind: str, disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    technique = Offload.build({"kind": kind, "device": "cpu", "disk": str(tmp_path) if disk else ""})
    device, rig = simulated(monkeypatch), make("flux")
    block: Any = rig.denoiser.get_submodule("single_transformer_blocks.1")
    kept, before = values(rig), fingerprint(rig)
    with rig.accelerated(technique) as session:
        rig.run()
        handle = block.proj_mlp.register_forward_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            rig.run()
        handle.remove()
        moving = units(session, technique)
        assert not [unit.name for unit in moving if unit.uses and not unit.lasting]
        with watching(device, moving):
            assert torch.equal(rig.run(), plain_output("flux"))
    assert device.present == 0
    block.proj_mlp.register_forward_pre_hook(_fail)
    with pytest.raises(ZeroDivisionError), rig.accelerated(technique):
        rig.run()
    block.proj_mlp._forward_pre_hooks.clear()
    assert not list(tmp_path.iterdir())
    assert fingerprint(rig)[1:] == before[1:]
    assert all(torch.equal(one, other) for one, other in zip(values(rig), kept, strict=True))


def _fail(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("technique", [VARIANTS[0], VARIANTS[1]], ids=str)
def test_running_out_of_memory_in_a_copy_is_survived(technique: Offload, monkeypatch: pytest.MonkeyPatch) -> None:
    device, rig = simulated(monkeypatch), make("flux")
    begin = device.begin
    with rig.accelerated(technique) as session:
        rig.run()
        left = [1]

        def short(sources: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError("out of memory")
            return begin(sources)

        device.begin = short  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(torch.OutOfMemoryError):
            rig.run()
        device.begin = begin  # pyright: ignore[reportAttributeAccessIssue]
        with watching(device, units(session, technique)):
            assert torch.equal(rig.run(), plain_output("flux"))
    assert device.present == 0
    assert torch.equal(rig.run(), plain_output("flux"))


def test_what_is_written_into_weights_meanwhile_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated(monkeypatch)
    rig, changed = make("dit"), make("dit")
    for one in (changed, rig):
        weight = one.vae.get_parameter("decoder.conv_out.bias")
        if one is rig:
            with rig.accelerated(Offload(device="cpu")):
                rig.run()  # the VAE came last and is still there
                with torch.no_grad():
                    weight.add_(1)
                inside = rig.run()
            assert torch.equal(inside, changed.run())
        else:
            with torch.no_grad():
                weight.add_(1)
    assert torch.equal(rig.run(), changed.run())


def test_only_chosen_components_move(monkeypatch: pytest.MonkeyPatch) -> None:
    device, rig = simulated(monkeypatch), make("dit")
    technique = Offload(kind="blocks", device="cpu", components=("trans*",))
    with rig.accelerated(technique) as session:
        assert {unit.name.partition(".")[0] for unit in units(session, technique)} == {"transformer"}
        assert torch.equal(rig.run(), plain_output("dit"))
        assert session.state(technique, Moved).ledger.managed == size_of(rig.denoiser)
    assert device.bytes


def test_a_bare_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    device, rig = simulated(monkeypatch), make("flux")
    arguments = rig.spec.example(rig.denoiser.config, seed=3)  # pyright: ignore
    plain = rig.call(arguments)
    with hasten.accelerate(rig.denoiser, BLOCKS):
        assert torch.equal(rig.call(arguments), plain)
    assert device.bytes


def test_weights_of_a_modulation_table_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device, rig = simulated(monkeypatch), make("flux")
    linears = timed_linears(Target.of(rig).denoisers[0])
    away = sum(size_of(module) for module in linears.values())
    with rig.accelerated(BLOCKS, ModulationTable()) as session:
        with watching(device, units(session, BLOCKS)):
            output = rig.run()
        assert session.state(BLOCKS, Moved).ledger.managed == size_of(rig.denoiser) + size_of(rig.vae) - away
        assert len(session.evidence()) == 2
    assert torch.allclose(output, plain_output("flux"), atol=1e-5)
    assert torch.equal(rig.run(), plain_output("flux"))


def test_parts_used_outside_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """DiT's first block lends its embedding to the output: with block-wise hooks that runs on weights elsewhere."""
    device, rig = simulated(monkeypatch), make("dit")
    with rig.accelerated(BLOCKS) as session, watching(device, units(session, BLOCKS)):
        rig.run()
        loads = copied(device, units(session, BLOCKS)).count("transformer.transformer_blocks.0")
    assert loads == 2 * 4, "once for the block and once for the output, in each of four steps"


@pytest.mark.parametrize("model", ["emoji-flux", "emoji-sd", "emoji-dit"])
def test_real_pipelines(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With text encoders, tokenizers and all; each kind, and beside a table."""
    pipe: Any = hasten.load(model).pipeline
    prompt: Any = [1] if model == "emoji-dit" else "pizza, fluent style"
    size = {} if model == "emoji-dit" else {"width": 64, "height": 64}
    size |= {"max_sequence_length": 16} if model == "emoji-flux" else {}

    def picture() -> torch.Tensor:
        torch.manual_seed(0)
        output = pipe(prompt, num_inference_steps=2, output_type="np", **size).images[0]
        return torch.from_numpy(output)

    pipe.set_progress_bar_config(disable=True)
    plain = picture()
    for technique in (*VARIANTS[:2], VARIANTS[4], OneAtATime(device="cpu")):
        device = simulated(monkeypatch)
        with hasten.accelerate(pipe, technique) as session, watching(device, units(session, technique)):
            assert torch.equal(picture(), plain)
    with hasten.accelerate(pipe, BLOCKS | ModulationTable()) as session:
        assert torch.allclose(picture(), plain, atol=1e-4)
        assert len(session.evidence()) == 2
    assert torch.equal(picture(), plain)


REFUSALS: dict[str, tuple[Callable[[Rig], object], Offload, str]] = {
    "no GPU": (lambda rig: None, Offload(), "there is no GPU"),
    "no such component": (lambda rig: None, Offload(device="cpu", components=("unicorn",)), "called 'unicorn'"),
    "no such GPU": (lambda rig: None, Offload(device="cuda:77"), "there is no device cuda:77"),
    "no folder": (lambda rig: None, Offload(device="cpu", disk="/no/such"), "the folder '/no/such' .* does not exist"),
    "left elsewhere": (
        lambda rig: rig.vae.to("meta"),
        Offload(device="cpu", components=("transformer",)),
        "the vae is on meta and would stay there",
    ),
    "moved already": (
        lambda rig: setattr(rig.vae, "_hf_hook", object()),
        Offload(device="cpu"),
        "the vae is already moved by accelerate or diffusers",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str) -> None:
    prepare, technique, words = REFUSALS[case]
    rig = make("flux")
    prepare(rig)
    if case == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(Refused, match=words):
        rig.accelerated(technique)


def test_weights_that_are_more_than_data_are_refused() -> None:
    class Packed(torch.Tensor):
        pass

    rig = make("flux")
    rig.vae.register_buffer("packed", torch.ones(2).as_subclass(Packed))
    with pytest.raises(Refused, match="weights of the vae are of type Packed"):
        rig.accelerated(BLOCKS)


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10

    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: Usage)  # pyright: ignore[reportUnknownLambdaType]
    with pytest.raises(Refused, match=r"0\.0 GB free, and the weights take"):
        make("flux").accelerated(Offload(kind="blocks", device="cpu", disk=str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_impossible_settings() -> None:
    with pytest.raises(InvalidSetting, match="write it like '8GB'"):
        Offload(pinned="plenty")
    with pytest.raises(InvalidSetting, match="write auto, cuda, cuda:1 or cpu"):
        make("flux").accelerated(Offload(device="gpu please"))


def test_two_that_place_the_same_component_are_refused() -> None:
    with pytest.raises(Refused, match=r"Offload.*OneAtATime|OneAtATime.*Offload"):
        make("flux").accelerated(Offload(device="cpu"), OneAtATime(device="cpu"))


def test_nothing_moved_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    simulated(monkeypatch)
    with make("flux").accelerated(BLOCKS) as session, pytest.raises(NotEngaged, match="no weights were brought in"):
        BLOCKS.engaged(session)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("pinned", ["0", "auto"])
@pytest.mark.parametrize("kind", ["model", "blocks", "leaf"])
def test_on_a_gpu(kind: str, pinned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make("flux").to("cuda")
    plain = rig.run()
    rig.to("cpu")
    monkeypatch.setattr(Rig, "device", torch.device("cuda"))  # as a pipeline, which asks where it runs
    technique = Offload.build({"kind": kind, "pinned": pinned})
    with rig.accelerated(technique) as session:
        rig.run()
        assert torch.equal(rig.run(), plain)
        pinned_bytes = session.state(technique, Moved).storage.pinned
        assert bool(pinned_bytes) == (pinned == "auto")
    assert {tensor.device.type for tensor in all_tensors(rig.denoiser)} == {"cpu"}
