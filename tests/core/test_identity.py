"""Which model a denoiser is: hashes that last, and the names in the places it was loaded from."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from torch import nn

from hasten.core.identity import config_hash, config_of, names_of, released_as
from hasten.core.registry import specs
from hasten.core.target import Denoiser, Target

CODE = """
from hasten.core.identity import config_hash
from hasten.core.target import Target
print(config_hash(Target.planned("FLUX.1-dev").denoisers[0]))
"""


def denoiser(architecture: str, place: str = "", seed: int = 0, **changes: Any) -> Denoiser:
    spec = specs()[architecture]
    module: Any = spec.build({**spec.tiny, **changes}, seed=seed)
    module.register_to_config(_name_or_path=place)
    return Denoiser("transformer", module, spec)


def test_a_hash_depends_on_the_configuration_alone() -> None:
    one, other = denoiser("flux", "here"), denoiser("flux", "there", seed=1)
    assert config_hash(one) == config_hash(other)
    assert len(config_hash(one)) == 16
    assert config_hash(denoiser("flux", num_layers=2)) != config_hash(one)
    assert len({config_hash(denoiser(name)) for name in specs()}) == len(specs())


def test_a_hash_is_the_same_in_another_process() -> None:
    known = config_hash(Target.planned("FLUX.1-dev").denoisers[0])
    found = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == known


def test_a_setting_at_its_default_does_not_count() -> None:
    """So that a hash stays when a later diffusers adds a setting."""
    assert config_hash(denoiser("flux", out_channels=None)) == config_hash(denoiser("flux"))
    config = config_of(denoiser("flux"))
    assert "out_channels" not in config
    assert config["axes_dims_rope"] == [4, 6, 6]
    assert not any(key.startswith("_") for key in config)


def test_a_hash_does_not_mind_an_accelerated_model() -> None:
    from hasten import FirstBlockCache, accelerate

    bare = denoiser("flux")
    before = config_hash(bare)
    with accelerate(bare.module, FirstBlockCache()):
        assert config_hash(bare) == before


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("black-forest-labs/FLUX.1-dev", "FLUX.1-dev"),
        ("/cache/hub/models--black-forest-labs--FLUX.1-dev/snapshots/3de623fc/transformer", "FLUX.1-dev"),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan2.1-T2V-14B"),
        (r"C:\models\emoji-flux\transformer", "emoji-flux"),
    ],
)
def test_names_come_from_the_place(place: str, name: str) -> None:
    assert name in names_of(denoiser("flux", place))


def test_what_has_no_place_has_no_name() -> None:
    assert names_of(denoiser("flux")) == ()
    assert names_of(Denoiser("denoiser", nn.Linear(1, 1), specs()["flux"])) == ()


def test_released_models_are_recognized_by_configuration() -> None:
    for name in ("FLUX.1-dev", "Qwen-Image", "Wan2.1-T2V-1.3B"):
        assert released_as(Target.planned(name).denoisers[0]) == (name,)
    assert released_as(Target.planned("Wan2.1-T2V-14B").denoisers[0]) == ("Wan2.1-T2V-14B", "Wan2.2-T2V-A14B")
    assert released_as(denoiser("flux")) == ()
