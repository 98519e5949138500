"""Predictions of recipes and the choice among them, with techniques whose costs are round."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import cast

import pytest

from hasten import CompileBlocks, DeepCache, OutputForecast, Recipe
from hasten.core.errors import HastenError
from hasten.core.files import read_json
from hasten.core.recipe import as_recipe
from hasten.core.registry import techniques
from hasten.core.target import Target
from hasten.core.technique import Cost, Technique
from hasten.core.workload import Workload
from hasten.search.predict import Prediction, plan, predict, profile
from hasten.search.prediction.devices import find_device, known_devices
from hasten.search.prediction.ladder import Ladder, Rung, ladder
from hasten.search.prediction.model import planned_model
from tests.search.prediction.stand_ins import (
    DEVICE,
    LADDER,
    PLAIN,
    Eighth,
    InTurn,
    Streamed,
    Stub,
    Unknowable,
    Whole,
    small,
)

ROOT = Path(__file__).parents[2]


def predicted(*techniques: Technique) -> Prediction:
    return predict(small(), DEVICE, Recipe(techniques))


def weights() -> dict[str, int]:
    return small().model.weights


def test_the_plain_pipeline_holds_all_weights_and_the_largest_activations() -> None:
    found, parts = predicted(), small().parts
    most = max(part.activations for part in parts.values())
    assert found.memory == sum(weights().values()) + most + small().resting
    assert found.seconds == pytest.approx(sum(found.phases.values()))
    assert found.step_seconds == pytest.approx(found.phases["transformer"] / 28)
    assert found.phases["transfers"] == 0


def test_parts_that_take_turns_leave_room_and_pay_for_moving() -> None:
    plain, found = predicted(), predicted(InTurn())
    assert found.memory == max(weights()[n] + p.activations for n, p in small().parts.items()) + small().resting
    assert found.phases["transfers"] == pytest.approx(sum(weights().values()) / DEVICE.host_link)
    assert found.step_seconds == plain.step_seconds


def test_streamed_weights_bound_the_step_and_casts_add_to_it() -> None:
    size = weights()["transformer"]
    assert predicted(Streamed()).step_seconds == pytest.approx(
        max(predicted().step_seconds or 0, size / DEVICE.host_link)
    )
    assert (predicted(Streamed()).peaks["transformer"]) < predicted(InTurn()).peaks["transformer"]
    both = predicted(Streamed(), Eighth())
    assert predicted(InTurn()).peaks["transformer"] - both.peaks["transformer"] == size - size // 20


def test_of_fewer_bytes_of_weights_fewer_pass_through() -> None:
    size, both = weights()["transformer"], predicted(Streamed(), Eighth())
    moving = size / DEVICE.host_link
    assert (predicted(Streamed()).step_seconds or 0) == pytest.approx(moving)
    assert (both.step_seconds or 0) == pytest.approx(max(moving / 2, (predicted(Eighth()).step_seconds or 0)))


def test_what_a_cache_leaves_out_is_not_moved() -> None:
    streamed, reused = predicted(Streamed()), predicted(Streamed(), OutputForecast(interval=2))
    assert (reused.step_seconds or 0) == pytest.approx((streamed.step_seconds or 0) / 2, rel=0.1)


def test_code_in_one_piece_needs_all_of_its_weights() -> None:
    size = weights()["transformer"]
    sealed = predicted(Streamed(), Whole())
    assert sealed.peaks["transformer"] - predicted(Streamed()).peaks["transformer"] == size - size // 10


def test_of_times_that_are_alike_the_simpler_recipe_is_picked() -> None:
    class Slightly(Stub):
        def cost(self, target: Target, workload: Workload) -> Cost:
            return Cost(time_factor=0.99)

    near = Ladder((PLAIN, Rung(Recipe((Slightly(),)), "little")), (PLAIN,))
    pick = plan(small(), DEVICE, rungs=near).pick
    assert pick is not None
    assert str(pick.recipe) == "plain"


def test_caches_and_compilers_shorten_the_step() -> None:
    plain, reused = predicted(), predicted(OutputForecast(interval=2))
    assert (reused.step_seconds or 0) / (plain.step_seconds or 1) == pytest.approx(0.5, abs=0.1)
    assert (reused.memory or 0) > (plain.memory or 0)
    assert reused.lossy
    compiled = predicted(CompileBlocks(backend="eager"))
    assert (compiled.step_seconds or 0) < (plain.step_seconds or 0)
    assert not compiled.lossy


def test_what_cannot_run_or_be_told_has_no_figures() -> None:
    refused = predicted(DeepCache())
    assert (refused.memory, refused.seconds) == (None, None)
    assert "no U-Net" in refused.refusals[0]
    unknown = predicted(Unknowable())
    assert unknown.seconds is None
    assert unknown.memory == predicted().memory


def test_more_pixels_and_steps_cost_more() -> None:
    model = planned_model("emoji-sd")
    small_one, large = (
        predict(profile(model, Workload(width=side, height=side, steps=steps)), DEVICE)
        for side, steps in ((128, 10), (256, 20))
    )
    assert (large.seconds or 0) > 1.9 * (small_one.seconds or 0)
    assert (large.memory or 0) > (small_one.memory or 0)


def limit(*techniques: Technique) -> int:
    return predicted(*techniques).memory or 0


def test_the_fastest_that_fits_is_picked_and_says_what_it_gave_up() -> None:
    roomy = plan(small(), DEVICE, rungs=LADDER).pick
    assert roomy is not None
    assert (str(roomy.recipe), roomy.gives_up) == ("plain", "")
    tight = plan(small(), DEVICE, limit(InTurn()), LADDER).pick
    assert tight is not None
    assert (str(tight.recipe), tight.gives_up) == ("InTurn()", "parts take turns")
    assert plan(small(), DEVICE, 1000, LADDER).pick is None


def test_a_change_to_the_picture_is_picked_only_where_nothing_else_fits() -> None:
    fast = Ladder((PLAIN, Rung(as_recipe(OutputForecast(interval=2)), "forecasts")), (PLAIN,))
    made = plan(small(), DEVICE, rungs=fast)
    assert made.pick is not None
    assert made.faster is not None
    assert not made.pick.lossy
    assert str(made.faster.recipe) == "OutputForecast()"
    lossy = plan(small(), DEVICE, limit(Eighth()), Ladder((PLAIN,), (PLAIN, Rung(Recipe((Eighth(),)), "8 bits"))))
    assert lossy.pick is not None
    assert lossy.pick.lossy


def test_the_front_holds_no_row_that_another_beats() -> None:
    rows = plan(small(), DEVICE, rungs=LADDER).front
    assert str(rows[0].recipe) == "plain"
    for one in rows:
        assert not any(
            (other.seconds or 0) < (one.seconds or 0)
            and (other.memory or 0) < (one.memory or 0)
            and other.lossy <= one.lossy
            for other in rows
        )


def test_what_driver_and_libraries_take_counts() -> None:
    device = dataclasses.replace(DEVICE, reserve=2**20)
    made = plan(small(), device, limit(), LADDER)
    assert made.pick is not None
    assert str(made.pick.recipe) != "plain"


def test_the_ladder_that_ships_is_sound(tmp_path: Path) -> None:
    rungs = ladder()
    assert str(rungs.speed[0].recipe) == str(rungs.memory[0].recipe) == "plain"
    assert all(rung.gives_up for rung in (*rungs.speed[1:], *rungs.memory[1:]))
    pairs = rungs.rungs()
    assert len({frozenset(rung.recipe) for rung in pairs}) == len(pairs)
    (tmp_path / "ladder.json").write_text('{"speed": [{"recipe": "plain"}], "memory": []}')
    with pytest.raises(HastenError, match="gives_up"):
        ladder(tmp_path / "ladder.json")


def test_rungs_that_need_8_bit_floats_are_for_devices_that_have_them() -> None:
    rung = Rung(Recipe((Eighth(),)), "bits", needs="float8")
    rungs = Ladder((PLAIN, Rung(Recipe((Whole(),)), "minutes")), (PLAIN, rung))
    for able in (False, True):
        made = plan(small(), dataclasses.replace(DEVICE, float8=able), rungs=rungs)
        assert any(Eighth() in p.recipe for p in made.predictions) == able
    cards = {name: find_device(name).float8 for name in known_devices()}
    assert {name for name, able in cards.items() if not able} == {"a100", "t4", "rtx3090", "rtx3060", "cpu"}


def test_a_rung_needs_what_devices_can_have(tmp_path: Path) -> None:
    text = '{"speed": [{"recipe": "plain", "gives_up": "", "needs": "flaot8"}], "memory": []}'
    (tmp_path / "ladder.json").write_text(text)
    with pytest.raises(HastenError, match="Did you mean float8"):
        ladder(tmp_path / "ladder.json")


def test_quantizers_are_on_the_ladder_and_take_less_the_fewer_bits() -> None:
    found = plan(small(), dataclasses.replace(DEVICE, float8=True))
    peaks = {str(p.recipe): p.peaks["transformer"] for p in found.predictions if p.memory is not None}
    named = ("OneAtATime()", "Int8Linear() | OneAtATime()", "Int4Linear() | OneAtATime()")
    assert peaks[named[0]] > peaks[named[1]] > peaks[named[2]]
    assert peaks["Float8Linear() | OneAtATime()"] == pytest.approx(peaks[named[1]], rel=0.02)
    assert peaks["Offload(kind='blocks') | ModulationTable()"] < peaks["Offload(kind='blocks')"]
    assert all(p.lossy for p in found.predictions if "Linear()" in str(p.recipe))


def test_the_ladder_names_techniques_that_exist() -> None:
    data = cast("dict[str, list[dict[str, str]]]", read_json(ROOT / "src" / "hasten" / "data" / "ladder.json"))
    named = {name for entries in data.values() for entry in entries for name in re.findall(r"(\w+)\(", entry["recipe"])}
    assert named <= set(techniques())


def test_rungs_join_what_they_give_up() -> None:
    both = Rung(Recipe((Stub(),)), "this") | Rung(Recipe((InTurn(),)), "that")
    assert both.gives_up == "this; that"
    assert len(both.recipe) == 2
