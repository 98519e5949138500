"""Caches: reuse of intermediate results over denoising steps, without training."""

from hasten.cache.ada_cache import AdaCache
from hasten.cache.db_cache import DBCache
from hasten.cache.deep_cache import DeepCache
from hasten.cache.first_block import FirstBlockCache
from hasten.cache.fora import FORA
from hasten.cache.mag_cache import MagCache
from hasten.cache.output_forecast import OutputForecast
from hasten.cache.planned_cache import PlannedCache
from hasten.cache.sea_cache import SeaCache
from hasten.cache.skip_guidance import SkipGuidance
from hasten.cache.step_mask import StepMask
from hasten.cache.taylor_seer import TaylorSeer
from hasten.cache.tea_cache import TeaCache

__all__ = [
    "FORA",
    "AdaCache",
    "DBCache",
    "DeepCache",
    "FirstBlockCache",
    "MagCache",
    "OutputForecast",
    "PlannedCache",
    "SeaCache",
    "SkipGuidance",
    "StepMask",
    "TaylorSeer",
    "TeaCache",
]
