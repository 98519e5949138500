"""Modules on several devices: maps are checked, every tensor is where it is used, and everything comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from hasten.attention import FusedQKV
from hasten.cache import FORA, FirstBlockCache, TaylorSeer
from hasten.compilation import CompileBlocks, CompileWhole
from hasten.core.errors import HastenError, InvalidSetting, NotEngaged, Refused
from hasten.core.expression import parse
from hasten.core.recipe import Recipe
from hasten.core.registry import specs
from hasten.core.session import Session, accelerate
from hasten.core.target import Target
from hasten.core.technique import Technique
from hasten.core.workload import Workload
from hasten.memory import DeviceMap, LayerwiseCasting, ModulationTable, Offload
from hasten.memory.device_map import PlacedEvidence
from hasten.memory.engine import borders, placement, places
from tests.contract.rigs import ARCHITECTURES, Rig, fingerprint, make, plain_output

REHEARSED = "cpu=1GB; cpu:1=1GB"
HALF = "transformer.transformer_blocks.1-2=cpu:1; transformer=cpu; vae=cpu:2"


def evidence(session: Session) -> PlacedEvidence:
    return cast(PlacedEvidence, next(iter(session.evidence().values())))


# What a map says, and what is wrong with it


def test_a_dictionary_becomes_the_same_text_everywhere() -> None:
    technique = DeviceMap(map={"transformer.transformer_blocks.0-9": "cuda:1", "": 0, "vae": "cpu"})  # pyright: ignore
    assert technique.map == "transformer.transformer_blocks.0-9=cuda:1; *=cuda:0; vae=cpu"
    recipe = Recipe((technique,))
    assert parse(repr(recipe)) == Recipe.from_toml(recipe.to_toml()) == recipe
    assert parse("DeviceMap(map={'vae': 'cpu', '': 'cuda:1'})") == Recipe((DeviceMap(map="vae=cpu; *=cuda:1"),))
    assert hash(technique) == hash(DeviceMap(map=cast(str, technique.map)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("transformer=cpu", "says nothing about the vae; add vae=cpu or another device"),
        ("transformer=cpu; vea=cpu", "there is no component 'vea'. Did you mean vae?"),
        ("transformer.transformr_blocks.0=cpu; *=cpu", "Did you mean transformer_blocks?"),
        ("transformer.transformer_blocks.0-9=cpu; *=cpu", "transformer.transformer_blocks has 0 to 3"),
        ("transformer.transformer_blocks.9=cpu; *=cpu", "transformer.transformer_blocks has 0 to 3"),
        ("transformer.transformer_blocks=cpu; vae=cpu", "transformer=cpu would be the device of the rest"),
        ("transformer=cpu; transformer=cpu:1; vae=cpu", "transformer is named twice"),
        (
            "transformer.transformer_blocks.0-2=cpu; transformer.transformer_blocks.2-3=cpu:1; *=cpu",
            "transformer.transformer_blocks.2 is named twice, by 'transformer.transformer_blocks.0-2' and",
        ),
        ("*=cuda:17", "there is no device cuda:17 on this machine"),
        ("*=gpu", "there is no device gpu:0 on this machine"),
    ],
)
def test_a_map_that_does_not_fit_the_model_is_refused(text: str, sentence: str) -> None:
    rig = make("dit")
    before = fingerprint(rig)
    with pytest.raises(Refused) as error:
        rig.accelerated(DeviceMap(map=text))
    assert sentence in str(error.value)
    assert fingerprint(rig) == before


@pytest.mark.parametrize("text", ["balancd", "transformer", "a=b=c", "=cpu", "vae=", "vae=c p u", ";;", ""])
def test_a_text_that_is_no_map_is_an_error(text: str) -> None:
    with pytest.raises(InvalidSetting):
        DeviceMap(map=text)


def test_a_value_that_is_no_device_is_an_error() -> None:
    with pytest.raises(InvalidSetting, match="the device of 'vae' must be a text or the number of a GPU"):
        DeviceMap(map={"vae": 1.5})  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidSetting, match="amount of memory"):
        DeviceMap(memory="cpu=lots")


def test_a_machine_without_gpus_is_told_what_to_write() -> None:
    if torch.cuda.is_available():
        pytest.skip("has GPUs")
    with pytest.raises(Refused, match=r"no GPU to spread weights over; memory='cpu=8GB; cpu:1=8GB' rehearses"):
        make("dit").accelerated(DeviceMap())
    with pytest.raises(Refused, match=r"weights take 1.06 MB, and there is room for cpu 1 kB, cpu:1 1 kB"):
        make("dit").accelerated(DeviceMap(memory="cpu=1KB; cpu:1=1KB"))


def test_shared_weights_stay_together() -> None:
    rig = make("dit")
    blocks = cast(Any, rig.denoiser).transformer_blocks
    blocks[1].ff.net[2].weight = blocks[0].ff.net[2].weight
    with pytest.raises(Refused, match=r"share weights, so they must be on one device"):
        rig.accelerated(DeviceMap(map="transformer.transformer_blocks.1=cpu:1; *=cpu"))


# Where everything is


def test_the_longest_name_wins_and_the_map_is_shown() -> None:
    rig = make("dit")
    with rig.accelerated(DeviceMap(map=HALF)) as session:
        assert "not engaged" in session.describe()
        rig.run()
        shown = evidence(session).device_map
        assert shown == {"transformer.transformer_blocks.1-2": "cpu:1", "transformer": "cpu", "vae": "cpu:2"}
        assert str(shown) in session.describe()
    with rig.accelerated(DeviceMap(map=shown)) as session:
        rig.run()
        assert evidence(session).device_map == shown


def test_a_single_model_needs_no_component_name() -> None:
    model = make("flux").denoiser
    call = specs()["flux"].example(cast(Any, model).config)
    plain = cast(Any, model)(**call, return_dict=False)[0]
    with accelerate(
        model, DeviceMap(map="transformer_blocks.0=cpu:1; single_transformer_blocks=cpu:2; *=cpu")
    ) as session:
        assert torch.allclose(cast(Any, model)(**call, return_dict=False)[0], plain, atol=1e-5)
        shown = evidence(session).device_map
    assert shown["denoiser.transformer_blocks.0"] == "cpu:1"
    assert shown["denoiser.single_transformer_blocks.0-2"] == "cpu:2"


def test_automatic_maps_share_by_bytes() -> None:
    rig = make("flux")
    total = sum(p.numel() * 4 for part in (rig.denoiser, rig.vae) for p in part.parameters())
    sizes: dict[str, dict[str, int]] = {}
    for how in ("balanced", "balanced_low_0", "sequential"):
        with rig.accelerated(DeviceMap(map=how, memory=REHEARSED)) as session:
            rig.run()
            placed = session.state(session.plan.techniques[0], _spread()).placed
            sizes[how] = {p: sum(piece.bytes for piece in placed if piece.place == p) for p in ("cpu", "cpu:1")}
            assert torch.allclose(rig.run(), plain_output("flux"), atol=1e-4)
    assert sizes["sequential"] == {"cpu": total, "cpu:1": 0}
    assert sizes["balanced_low_0"] == {"cpu": 0, "cpu:1": total}
    assert abs(sizes["balanced"]["cpu"] - total / 2) < 0.15 * total


def _spread() -> type[Any]:
    from hasten.memory import device_map

    return cast("type[Any]", device_map._Spread)  # pyright: ignore[reportPrivateUsage]


def test_free_memory_of_gpus_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    present: list[dict[str, int]] = []

    def usable(there: dict[str, int]) -> dict[str, int]:
        present.append(there)
        return {"cpu": 10**6, "cpu:1": 10**9}

    monkeypatch.setattr("hasten.memory.device_map.usable_memory", usable)
    rig = make("flux")
    with rig.accelerated(DeviceMap(map="sequential")) as session:
        rig.run()
        assert set(evidence(session).device_map.values()) == {"cpu", "cpu:1"}
    assert present[0]["cpu"] > 10**6


def test_devices_have_one_way_of_writing() -> None:
    assert [places.canonical(text) for text in ("cuda", "cuda:1", "cpu", "cpu:0", "cpu:2")] == [
        "cuda:0",
        "cuda:1",
        "cpu",
        "cpu",
        "cpu:2",
    ]


class Apart(TorchFunctionMode):
    """Treats rehearsed devices like real ones: an operation on tensors of two of them is an error."""

    def __init__(self, homes: dict[int, str]) -> None:
        super().__init__()
        self.homes, self.places, self.checked = homes, WeakIdKeyDictionary(), 0

    def place(self, value: Any) -> str | None:
        return self.homes.get(id(value)) or cast("str | None", self.places.get(value))

    def tag(self, value: Any, place: str) -> None:
        for leaf in tree_leaves(value):
            if isinstance(leaf, torch.Tensor):
                self.places[leaf] = place

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        found = {place for tensor in tensors if (place := self.place(tensor))}
        assert len(found) < 2, f"{func} on tensors of {found}"
        result = func(*args, **(kwargs or {}))
        if found and "__get__" not in getattr(func, "__name__", ""):
            self.checked += 1
            self.tag(result, found.pop())
        return result


def apart(session: Session, technique: Technique, monkeypatch: pytest.MonkeyPatch) -> Apart:
    pieces = session.state(technique, _spread()).placed
    mode = Apart({id(tensor): piece.place for piece in pieces for tensor in piece.tensors})

    def carry(data: torch.Tensor, place: str) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            moved = data.clone()
        mode.tag(moved, place)
        return moved

    monkeypatch.setattr(borders, "carry", carry)
    return mode


def scattered(rig: Rig) -> DeviceMap:
    """Every other block on another device, and the VAE on a third."""
    tree = placement.Tree(Target.of(rig))
    blocks = [name for name, _ in tree.pieces() if "." in name]
    main = next(name for name in tree.roots if name != "vae")
    return DeviceMap(map={**dict.fromkeys(blocks[::2], "cpu:1"), main: "cpu", "vae": "cpu:2"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_operation_sees_two_devices(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make(architecture)
    technique = scattered(rig)
    with rig.accelerated(technique) as session, apart(session, technique, monkeypatch) as mode:
        output = rig.run(steps=2)
        assert mode.checked > 100
    assert torch.allclose(output, plain_output(architecture, steps=2), atol=1e-4, rtol=1e-3)


def test_the_check_notices_a_border_that_is_not_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(self: Any, place: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return run(*args, **kwargs)

    rig = make("dit")
    technique = scattered(rig)
    monkeypatch.setattr(borders.Borders, "call", careless)
    with rig.accelerated(technique) as session:
        mode = apart(session, technique, monkeypatch)
        with mode, pytest.raises(AssertionError, match="on tensors of"):
            rig.run(steps=2)


def controlled(rig: Rig, call: Callable[..., Any]) -> torch.Tensor:
    given: dict[str, Any] = rig.spec.example(cast(Any, rig.denoiser).config)
    torch.manual_seed(1)
    shape = (*given["hidden_states"].shape[:2], 32)
    heads = cast(Any, rig.denoiser).inner_dim
    extra = [torch.randn(*shape[:2], heads) for _ in range(2)]
    return call(**given, controlnet_block_samples=extra, return_dict=False)[0]


def test_what_a_controlnet_adds_between_blocks_meets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make("flux")
    plain = controlled(rig, rig.denoiser)
    technique = scattered(rig)
    with rig.accelerated(technique) as session, apart(session, technique, monkeypatch):
        assert torch.allclose(controlled(rig, rig.denoiser), plain, atol=1e-4)


PARTNERS: Iterable[Technique] = (
    FirstBlockCache(threshold=0.5),
    FORA(interval=2),
    TaylorSeer(),
    FusedQKV(),
    LayerwiseCasting(),
)


@pytest.mark.parametrize("partner", PARTNERS, ids=str)
def test_others_never_see_two_devices_either(partner: Technique, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make("flux")
    with rig.accelerated(partner):
        alone = rig.run()
    technique = scattered(rig)
    with rig.accelerated(technique, partner) as session, apart(session, technique, monkeypatch):
        assert torch.allclose(rig.run(), alone, atol=1e-4, rtol=1e-3)


def test_blocks_may_be_compiled_but_not_what_lies_on_several_devices() -> None:
    rig = make("dit")
    with rig.accelerated(DeviceMap(map=HALF), CompileBlocks(backend="eager")) as session:
        assert torch.allclose(rig.run(), plain_output("dit"), atol=1e-4)
        assert len(session.evidence()) == 2
    with pytest.raises(Refused, match="moves tensors between devices in the middle"):
        rig.accelerated(DeviceMap(map=HALF), CompileWhole(backend="eager"))
    inside = "transformer.transformer_blocks.1.ff=cpu:1; *=cpu"
    session = rig.accelerated(DeviceMap(map=inside), CompileBlocks(backend="eager"))
    with session, pytest.raises(HastenError, match=r"transformer_blocks\.1 is compiled as one piece"):
        rig.run()


def test_one_placement_at_a_time() -> None:
    rig = make("flux")
    with pytest.raises(Refused, match="placement of the weights"):
        rig.accelerated(DeviceMap(map="*=cpu"), Offload(device="cpu"))
    with pytest.raises(Refused, match="the weights of adaptive norms"):
        rig.accelerated(DeviceMap(memory=REHEARSED), ModulationTable())
    with rig.accelerated(DeviceMap(map="transformer=cpu; vae=cpu:1"), ModulationTable()) as session:
        assert torch.allclose(rig.run(), plain_output("flux"), atol=1e-4)
        assert len(session.evidence()) == 2


def test_weights_really_move_and_come_back() -> None:
    rig = make("dit")
    weight = cast(nn.Linear, rig.denoiser.get_submodule("transformer_blocks.1.attn1.to_q")).weight
    stays = cast(nn.Linear, rig.denoiser.get_submodule("proj_out_1")).weight
    before, where, kept = weight.data.clone(), weight.data_ptr(), stays.data_ptr()
    with rig.accelerated(DeviceMap(map=HALF)):
        assert weight.data_ptr() != where
        assert stays.data_ptr() == kept
    assert torch.equal(weight.data, before)


def test_weights_that_were_moved_away_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rig, technique = make("dit"), DeviceMap(map=HALF)
    with rig.accelerated(technique) as session:
        with pytest.raises(NotEngaged, match="no placed module was called"):
            technique.engaged(session)
        rig.run()
        monkeypatch.setattr("hasten.memory.device_map.device_of", lambda place: torch.device("meta"))  # pyright: ignore
        with pytest.raises(NotEngaged, match=r"weights of transformer.* are not on cpu"):
            technique.engaged(session)


def test_the_cost_is_what_the_main_device_holds() -> None:
    rig = make("dit")
    held = DeviceMap(map=HALF).cost(Target.of(rig), Workload(prompts=("a",), steps=4)).held
    blocks = cast(Any, rig.denoiser).transformer_blocks
    away = sum(p.numel() * 4 for block in blocks[1:3] for p in (*block.parameters(), *block.buffers()))
    assert held["vae"] == 0
    whole = sum(p.numel() * 4 for p in (*rig.denoiser.parameters(), *rig.denoiser.buffers()))
    assert held["transformer"] == whole - away


def test_the_distribution_that_a_vae_returns_comes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    carried: list[tuple[int, str]] = []
    carry = borders.carry

    def counting(data: torch.Tensor, place: str) -> torch.Tensor:
        carried.append((data.numel(), place))
        return carry(data, place)

    monkeypatch.setattr(borders, "carry", counting)
    rig = make("dit")
    vae, picture = cast(Any, rig.vae), torch.ones(1, 3, 8, 8)
    plain = vae.encode(picture).latent_dist
    with rig.accelerated(DeviceMap(map="vae=cpu:1; *=cpu")):
        found = vae.encode(picture).latent_dist
    assert type(found) is type(plain)
    assert torch.equal(found.mode(), plain.mode())
    assert carried[0] == (picture.numel(), "cpu:1")
    assert (plain.mean.numel(), "cpu") in carried


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("home", ["cuda:0", "cpu"])
def test_cpu_and_gpu_together(architecture: str, home: str) -> None:
    rig = make(architecture)
    other = "cuda:0" if home == "cpu" else "cpu"
    devices = {"cpu": home, "cpu:1": other, "cpu:2": "cuda:0"}
    pairs = places.read_pairs(cast(str, scattered(rig).map), "the map")
    mapping = {name: devices[place] for name, place in pairs}
    before = fingerprint(rig)
    with rig.accelerated(DeviceMap(map=mapping)) as session:
        output = rig.run(steps=2)
        assert evidence(session).device_map
    assert torch.allclose(output.cpu(), plain_output(architecture, steps=2), atol=1e-2, rtol=1e-2)
    assert fingerprint(rig)[1:] == before[1:]
    assert all(p.device.type == "cpu" for p in rig.denoiser.parameters())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("how", ["balanced", "balanced_low_0", "sequential"])
def test_two_gpus(how: str) -> None:
    rig = make("flux").to("cuda")
    plain = rig.run()
    with rig.accelerated(DeviceMap(map=how, memory="cuda:0=1MB; cuda:1=1GB")) as session:
        assert torch.allclose(rig.run(), plain, atol=1e-3, rtol=1e-3)
        assert "cuda:1" in evidence(session).device_map.values()
    assert {str(p.device) for p in rig.denoiser.parameters()} == {"cuda:0"}
