"""The plan file: what it refuses, what it keeps, and how a budget picks a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.records import Grid, Plan, PlanKey, SeedRecord
from hasten.core.errors import HastenError, InvalidSetting

T = 8
SIGMA = tuple(np.linspace(1, 0, T + 1).tolist())
KEY = PlanKey(
    model="some/model", weights_sha256="ab" * 32, scheduler="S", steps=T, width=64, height=64, scheduler_config={"x": 1}
)


def record(seed: int = 0, size: int = T + 1) -> SeedRecord:
    vectors = np.random.default_rng(seed).standard_normal((size, 40))
    return SeedRecord.of(vectors @ vectors.T, seed=seed, prompt="a fish")


def plan(full: int, **measured: Any) -> Plan:
    compute = tuple(k * T // full for k in range(full))
    return Plan(full_steps=full, compute=compute, rules=("velocity/index/1c",) * full, origin="uniform", **measured)


def plan_file(*plans: Plan, **more: Any) -> PlanFile:
    grid = Grid(alpha=tuple(1 - s for s in SIGMA), sigma=SIGMA)
    return PlanFile(key=KEY, grid=grid, records=(record(0), record(1)), plans=plans, **more)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    file = plan_file(plan(2, predicted_db=20.0, chosen=True), plan(4), gains=(1.0,) * (T + 1), plain_seconds=2.0)
    assert PlanFile.load(file.save(tmp_path / "plan.json")) == file


def test_equal_rules_are_written_once_and_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    mixed = plan(2).model_copy(update={"rules": ("velocity/index/1c", "velocity/index/0")})
    file = plan_file(plan(4), mixed, plan(2, measured_psnr=30.0, chosen=True)).save(tmp_path / "plan.json")
    equal, different, measured = json.loads(file.read_text("utf-8"))["plans"]
    assert equal["rules"] == "velocity/index/1c"
    assert different["rules"] == ["velocity/index/1c", "velocity/index/0"]
    assert {"measured_psnr", "measured_seconds", "chosen"}.isdisjoint(equal)
    assert (measured["measured_psnr"], measured["chosen"]) == (30.0, True)
    assert PlanFile.load(file).plans == (plan(4), mixed, plan(2, measured_psnr=30.0, chosen=True))


def test_a_record_keeps_inner_products_to_single_precision() -> None:
    vectors = np.random.default_rng(3).standard_normal((9, 500))
    basis = SeedRecord.of(vectors @ vectors.T, seed=0).basis()
    assert np.allclose(basis.T @ basis, vectors @ vectors.T, rtol=0, atol=500 * 2e-7)
    assert record().size == 9


def test_nearly_equal_outputs_keep_their_small_difference() -> None:
    step = np.random.default_rng(3).standard_normal((2, 500))
    vectors = np.stack([step[0], step[0] + 1e-5 * step[1]])
    basis = SeedRecord.of(vectors @ vectors.T, seed=0).basis()
    difference = np.linalg.norm(basis[:, 1] - basis[:, 0])
    assert difference == pytest.approx(np.linalg.norm(vectors[1] - vectors[0]), rel=0.02)


Change = tuple[tuple[str | int, ...], Any]
BROKEN: list[tuple[Change, str]] = [
    ((("schema",), 2), "schema 2"),
    ((("plan",), []), "plan: unknown field (did you mean plans?)"),
    ((("gains",), [1.0]), "gains needs 9 numbers"),
    ((("gains",), [-1.0] * 9), "gains[0]"),
    ((("key", "weights_sha256"), "zz"), "key.weights_sha256"),
    ((("key", "steps"), 9), "key.steps is 9"),
    ((("grid", "sigma", 2), 9.0), "grid: sigma/(alpha+sigma) must fall"),
    ((("grid", "alpha"), [0.0]), "grid: alpha and sigma need one number per node"),
    ((("grid", "solver"), "heun"), "grid.solver"),
    ((("records", 0, "factor"), "%%"), "records[0]: factor is not base64"),
    ((("records", 0, "factor"), "AAAAAA=="), "records[0]: factor is no upper triangle"),
    ((("records", 1, "factor"), record(size=5).factor), "records[1].factor is for 4 steps"),
    ((("records",), []), "records"),
    ((("plans", 0, "compute"), [0, 9]), "plans[0].compute names step 9"),
    ((("plans", 0, "compute"), [1, 4]), "plans[0]: compute must rise from 0"),
    ((("plans", 0, "compute"), [0, 0]), "plans[0]: compute must rise from 0"),
    ((("plans", 0, "full_steps"), 3), "for each of the 3 full steps"),
    ((("plans", 0, "rules"), ["velocity/index/1", "velocity/index/9"]), "plans[0]: The order of a forecast"),
    ((("plans", 0, "rules"), "velocit/index/1"), "Did you mean velocity?"),
    ((("plans", 0, "rules"), ["velocity/index/1"]), "for each of the 2 full steps"),
    ((("plans", 0, "measured_seconds"), 0), "plans[0].measured_seconds"),
    ((("plans", 1, "full_steps"), "many"), "plans[1].full_steps"),
]


@pytest.mark.parametrize(("change", "said"), BROKEN, ids=[str(k) for k in range(len(BROKEN))])
def test_errors_name_the_file_and_the_field(tmp_path: Path, change: Change, said: str) -> None:
    data: Any = json.loads(plan_file(plan(2), plan(4)).save(tmp_path / "plan.json").read_text("utf-8"))
    (*path, last), value = change
    place = data
    for part in path:
        place = place[part]
    place[last] = value
    (tmp_path / "broken.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(HastenError) as caught:
        PlanFile.load(tmp_path / "broken.json")
    assert "broken.json" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"), [("[]", "no plan file"), ("{", "not valid JSON"), ('{"schema": NaN}', "NaN")]
)
def test_other_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "other.json").write_text(text, "utf-8")
    with pytest.raises(HastenError, match=said):
        PlanFile.load(tmp_path / "other.json")


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        plan(2, predicted_db=float("nan"))


def test_a_budget_in_full_steps_is_exact() -> None:
    file = plan_file(plan(2), plan(4))
    assert file.choose(full_steps=4).full_steps == 4
    with pytest.raises(InvalidSetting, match=r"full_steps=7; the nearest is 4"):
        file.choose(full_steps=7)


def test_the_chosen_plan_is_taken() -> None:
    other = plan(4).model_copy(update={"compute": (0, 1, 2, 3), "chosen": True})
    assert plan_file(plan(4), other).choose(full_steps=4) == other


def test_speedup_counts_steps_until_seconds_are_measured() -> None:
    file = plan_file(plan(2), plan(4), plan(6))
    assert file.choose(speedup=2).full_steps == 4
    assert file.choose(speedup=1.9).full_steps == 4
    with pytest.raises(InvalidSetting, match=r"speedup=5; the nearest is 4 \(steps over full steps\)"):
        file.choose(speedup=5)
    timed = [plan(full, measured_seconds=seconds) for full, seconds in ((2, 1.0), (4, 1.4), (6, 1.9))]
    measured = plan_file(*timed, plain_seconds=2.0)
    assert measured.choose(speedup=2).full_steps == 2
    with pytest.raises(InvalidSetting, match=r"nearest is 2 \(measured\)"):
        measured.choose(speedup=2.1)


def test_seconds_and_psnr_need_measurements() -> None:
    file = plan_file(plan(2, measured_psnr=25.0, measured_seconds=1.0), plan(4, measured_psnr=35.0), plan(6))
    assert file.choose(min_psnr=20).full_steps == 2
    assert file.choose(min_psnr=30).full_steps == 4
    assert file.choose(seconds=1.5).full_steps == 2
    with pytest.raises(InvalidSetting, match=r"min_psnr=40; the nearest is 35 dB"):
        file.choose(min_psnr=40)
    with pytest.raises(InvalidSetting, match=r"seconds=0.5; the nearest is 1 s"):
        file.choose(seconds=0.5)
    with pytest.raises(InvalidSetting, match="none has measured_psnr"):
        plan_file(plan(2)).choose(min_psnr=30)


def test_one_budget_at_a_time() -> None:
    with pytest.raises(InvalidSetting, match="exactly one"):
        plan_file(plan(2)).choose()
    with pytest.raises(InvalidSetting, match="exactly one"):
        plan_file(plan(2)).choose(full_steps=2, speedup=2)
    with pytest.raises(InvalidSetting, match="no plans"):
        plan_file().choose(full_steps=2)


def test_a_measured_plan_replaces_the_same_plan() -> None:
    file = plan_file(plan(2), plan(4)).with_plans([plan(4, measured_psnr=30.0, chosen=True)])
    assert [one.measured_psnr for one in file.plans] == [None, 30.0]
    with pytest.raises(ValueError, match="two chosen"):
        file.with_plans([plan(4).model_copy(update={"compute": (0, 1, 2, 3), "chosen": True})])


def test_the_key_says_what_differs() -> None:
    now = KEY.model_copy(update={"width": 128, "weights_sha256": "cd" * 32, "scheduler_config": {"x": 2}})
    said = KEY.differences(now)
    assert said[0] == "weights_sha256 is cdcdcdcdcdcd..., calibrated with abababababab..."
    assert said[1:] == ("scheduler_config is {'x': 2}, calibrated with {'x': 1}", "width is 128, calibrated with 64")
    assert KEY.differences(KEY) == ()
