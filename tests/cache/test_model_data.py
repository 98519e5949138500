"""The numbers that ship with hasten, and how the right ones are found - or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hasten.cache.engine.model_data import MAGCACHE, TEACACHE, Library, NoData
from hasten.core.errors import HastenError
from hasten.core.identity import config_hash
from hasten.core.registry import specs
from hasten.core.target import Denoiser, Target
from hasten.models import bundled

LIBRARIES: list[Library[Any]] = [TEACACHE, MAGCACHE]


def tiny(place: str = "", architecture: str = "flux") -> Denoiser:
    spec = specs()[architecture]
    module: Any = spec.build_tiny()
    module.register_to_config(_name_or_path=place)
    return Denoiser("transformer", module, spec)


def planned(name: str) -> Denoiser:
    return Target.planned(name).denoisers[0]


@pytest.mark.parametrize("library", LIBRARIES)
def test_every_set_says_where_it_comes_from(library: Library[Any]) -> None:
    for name, one in library.shipped.items():
        assert one.provenance.by
        assert one.config if name in bundled() else one.provenance.source.startswith("https://github.com/")
        assert one.provenance.licence == (None if name in bundled() else "Apache-2.0")


def test_published_numbers_are_there() -> None:
    flux = TEACACHE.shipped["FLUX.1-dev"]
    assert flux.coefficients == (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
    assert flux.speedups == {"0.25": 1.5, "0.4": 1.8, "0.6": 2.0, "0.8": 2.25}
    wan = [name for name in TEACACHE.shipped if name.startswith("Wan2.1")]
    assert len(wan) == 8
    assert all(len(one.coefficients) == 5 for one in TEACACHE.shipped.values())
    assert {"HunyuanVideo", "mochi-1-preview", "LTX-Video", "Cosmos", "CogVideoX-2b"} <= set(TEACACHE.shipped)


def test_flux_ratios_are_those_of_diffusers() -> None:
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    assert MAGCACHE.shipped["FLUX.1-dev"].ratios == pytest.approx(FLUX_MAG_RATIOS.tolist())
    for name, one in MAGCACHE.shipped.items():
        assert one.ratios[0] == 1.0
        assert all(0.2 < ratio < 2 for ratio in one.ratios), name


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["emoji-flux", "emoji-sd", "emoji-dit"])
def test_bundled_models_find_their_own(library: Library[Any], name: str) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(bundled()[name])
    denoiser = Target.of(pipe).denoisers[0]
    assert library.choose("auto", denoiser) is library.shipped[name]
    assert library.shipped[name].config == config_hash(denoiser)
    moved = Denoiser(denoiser.name, denoiser.module, denoiser.spec)
    moved.module.register_to_config(_name_or_path="somewhere/else")  # pyright: ignore
    assert library.choose("auto", moved) is library.shipped[name], "by its configuration"


def test_a_released_model_is_found_by_place_and_by_configuration() -> None:
    flux = TEACACHE.shipped["FLUX.1-dev"]
    assert TEACACHE.choose("auto", planned("FLUX.1-dev")) is flux
    assert TEACACHE.choose("auto", tiny("black-forest-labs/FLUX.1-dev")) is flux
    assert TEACACHE.choose("flux.1-DEV", tiny()) is flux
    assert MAGCACHE.choose("auto", tiny("x/FLUX.1-Kontext-dev")) is MAGCACHE.shipped["FLUX.1-Kontext-dev"]


def test_models_of_one_configuration_are_not_taken_for_each_other() -> None:
    with pytest.raises(NoData, match=r"configuration of Wan2.1-T2V-14B and of Wan2.2-T2V-A14B.*coefficients="):
        TEACACHE.choose("auto", planned("Wan2.1-T2V-14B"))
    named = planned("Wan2.2-T2V-A14B")
    named.module.register_to_config(_name_or_path="Wan-AI/Wan2.2-T2V-A14B-Diffusers")  # pyright: ignore
    with pytest.raises(NoData, match="There are no TeaCache coefficients for this WanTransformer3DModel"):
        TEACACHE.choose("auto", named)
    assert MAGCACHE.choose("auto", named) is MAGCACHE.shipped["Wan2.2-T2V-A14B"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_model_without_numbers_is_told_the_command(library: Library[Any]) -> None:
    with pytest.raises(NoData, match=f"hasten calibrate MODEL --for {library.kind} -o .*FLUX.1-dev"):
        library.choose("auto", tiny())
    with pytest.raises(NoData, match=r"called 'FLUX.1-def', nor is it a .json file. Did you mean FLUX.1-dev"):
        library.choose("FLUX.1-def", tiny())


def written(folder: Path, *names: str, **changes: Any) -> str:
    one = {"models": [], "coefficients": [1.0, 0.0], "provenance": {"by": "a test"}} | changes
    file = folder / "own.json"
    file.write_text(json.dumps({"schema": 1, "kind": "teacache", "sets": dict.fromkeys(names or ("mine",), one)}))
    return str(file)


def test_a_file_is_used_for_the_model_it_was_made_for(tmp_path: Path) -> None:
    assert TEACACHE.choose(written(tmp_path), tiny()).coefficients == (1.0, 0.0)
    assert TEACACHE.choose(written(tmp_path, config=config_hash(tiny())), tiny())
    with pytest.raises(NoData, match=r"own.json was made for mine, whose configuration differs from this Flux"):
        TEACACHE.choose(written(tmp_path, config="0" * 16), tiny())
    assert TEACACHE.choose(written(tmp_path, "a", "b", models=["a"]), tiny("a"))
    with pytest.raises(NoData):
        TEACACHE.choose(written(tmp_path, "a", "b", models=["a"]), tiny("c"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1"),
        ("[]", 'no "kind" entry'),
        ('{"kind": "magcache"}', "it was made for magcache"),
        ('{"schema": 1, "kind": "teacache", "sets": {}}', "sets: "),
        ('{"schema": 1, "kind": "teacache", "sets": {"a": {"models": []}}}', r"sets\.a\.\w+: Field required"),
        ('{"schema": 2, "kind": "teacache", "sets": {}}', "schema"),
    ],
)
def test_a_bad_file_is_named_with_the_field(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(HastenError, match=message) as caught:
        TEACACHE.choose(str(file), tiny())
    assert str(file) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(HastenError, match="There is no file"):
        MAGCACHE.choose(str(tmp_path / "none.json"), tiny())
