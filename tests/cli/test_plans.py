"""`hasten calibrate` for plans, and `hasten compare --budget`."""

from __future__ import annotations

from pathlib import Path

from hasten.cache.engine.plan_file import PlanFile
from hasten.measure.comparison import Comparison
from tests.cli.conftest import Run


def test_a_plan_is_made_and_used(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    result = run("calibrate", "emoji-flux", "--steps", 4, "--pictures", 2, "-o", file)
    assert result.exit_code == 0, result.output
    assert "PlannedCache(plan=" in result.output
    assert PlanFile.load(file).grid.steps == 4
    pictures = ("--steps", 4, "--prompt", "pizza, fluent style", "--no-fewer-steps", "--out", tmp_path / "report")
    recipes = ("-r", f'PlannedCache(plan="{file}")', "-r", "FORA()")
    result = run("compare", "emoji-flux", "--budget", "2x", *pictures, *recipes)
    assert result.exit_code == 0, result.output
    rows = Comparison.load(tmp_path / "report" / "comparison.json").rows
    assert [row.steps.full for row in rows if row.steps] == [4, 2, 2]


def test_wrong_budgets_and_goals_are_told(run: Run, tmp_path: Path) -> None:
    result = run("compare", "emoji-flux", "--budget", "half", "-r", "FORA()", "--out", tmp_path / "report")
    assert result.exit_code == 2
    assert "2x" in result.output
    result = run("calibrate", "emoji-flux", "--goal", "reprodce", "-o", tmp_path / "plan.json")
    assert result.exit_code == 2
    assert "reproduce" in result.output
