"""Plans for caches from calibration runs: which steps to compute in full, and how to guess the others."""

from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.records import Grid, Plan, PlanKey, SeedRecord, SolverAnswer
from hasten.search.planning.gains import interpolated_gains, landing_gain
from hasten.search.planning.planner import Planner, default_rules, neighbours, uniform
from hasten.search.planning.recording import Recorder
from hasten.search.planning.regrid import regrid
from hasten.search.planning.replan import planner_of, replan, standing_plans

__all__ = [
    "Grid",
    "Plan",
    "PlanFile",
    "PlanKey",
    "Planner",
    "Recorder",
    "SeedRecord",
    "SolverAnswer",
    "default_rules",
    "interpolated_gains",
    "landing_gain",
    "neighbours",
    "planner_of",
    "regrid",
    "replan",
    "standing_plans",
    "uniform",
]
