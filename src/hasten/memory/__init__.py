"""Offload, device maps and other ways to need less memory."""

from hasten.memory.device_map import DeviceMap
from hasten.memory.layerwise_casting import LayerwiseCasting
from hasten.memory.modulation_table import ModulationTable
from hasten.memory.offload import Offload
from hasten.memory.one_at_a_time import OneAtATime
from hasten.memory.vae_slicing import VaeSlicing
from hasten.memory.vae_tiling import VaeTiling

__all__ = [
    "DeviceMap",
    "LayerwiseCasting",
    "ModulationTable",
    "Offload",
    "OneAtATime",
    "VaeSlicing",
    "VaeTiling",
]
