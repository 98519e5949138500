"""Plans for caches from calibration runs: which steps to compute in full, and how to guess the others."""

from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.records import Grid, Plan, PlanKey, SeedRecord, SolverAnswer
from hasten.cache.planning.gains import interpolated_gains, landing_gain
from hasten.cache.planning.planner import Planner, default_rules, neighbours, uniform
from hasten.cache.planning.recording import Recorder
from hasten.cache.planning.regrid import regrid
from hasten.cache.planning.replan import planner_of, replan, standing_plans

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
