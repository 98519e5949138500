"""Devices: how fast they multiply, attend, move bytes and start kernels - from a table, or measured here."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch

from hasten.core.errors import HastenError, UnknownName
from hasten.core.files import read_json


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a roofline needs to know; sustained rates, in operations or bytes a second, not a data sheet's peaks.

    Rates by type: `float32` and `half` (bfloat16 and float16).
    """

    name: str
    title: str
    memory: int
    """Bytes."""
    product: dict[str, float] = field(hash=False)
    """Large matrix products."""
    attention: dict[str, float] = field(hash=False)
    """Fused attention with heads of 128."""
    convolution: dict[str, float] = field(hash=False)
    bandwidth: float
    """Copies within the device's memory."""
    pass_share: float = 0.75
    """What single elementwise kernels reach of that, reading and writing in two types."""
    fused_share: float = 0.6
    """What a compiler's fused kernels reach of it, which compute more between reading and writing."""
    host_link: float = 20e9
    processors: int = 1
    """Streaming multiprocessors, which share the tiles of a product; 1 leaves that out."""
    kernel_seconds: float = 2e-6
    """Least time of a kernel on the device."""
    launch_seconds: float = 12e-6
    """Time of the host to start one kernel through PyTorch."""
    view_seconds: float = 4e-6
    """The same for an operation without a kernel."""
    module_seconds: float = 20e-6
    """Time of the host for one module's call and its own Python code."""
    graph_seconds: float = 100e-6
    """Time of the host for one call of compiled code: guards, arguments."""
    reserve: int = 0
    """Bytes that the driver's context and the libraries take beside PyTorch's tensors."""
    workspace: int = 0
    """Bytes that PyTorch allocates for the products' workspace."""
    overlaps: bool = True
    """Does the host run ahead of the device? Not on a CPU, where both are one."""
    float8: bool = False
    """Does it multiply 8-bit floats (compute capability 8.9 and later)?"""
    basis: str = "data sheet"
    source: str = ""

    def rate(self, rates: dict[str, float], dtype: torch.dtype) -> float:
        """The rate for a type; types that are not known count as float32."""
        return rates["half" if dtype in (torch.bfloat16, torch.float16) else "float32"]


def known_devices() -> list[str]:
    """Names of the devices in the table."""
    return list(_table()["devices"])


def find_device(name: str) -> Device:
    """A device by its name in the table, such as `h200` or `RTX 4090`; an unknown one suggests neighbours."""
    table = _table()
    folded = name.casefold().replace(" ", "").replace("_", "-")
    if folded not in table["devices"]:
        raise UnknownName("device in the table", name, [*table["devices"], "here"])
    return _from_entry(folded, table["devices"][folded], table)


def device_titled(title: str) -> Device | None:
    """The device that PyTorch calls by this title, such as `NVIDIA H200`; None where the table has none like it."""
    table = _table()
    fitting = [
        (len(text), name)
        for name, entry in table["devices"].items()
        for text in entry["matches"]
        if text.casefold() in title.casefold()
    ]
    # "RTX 4080" is part of "RTX 4080 Laptop GPU", which is another card.
    if not fitting or any(word in title for word in ("Laptop", "Max-Q", "MIG", "SUPER", " Ti")):
        return None
    name = max(fitting)[1]
    return _from_entry(name, table["devices"][name], table)


def _table() -> dict[str, Any]:
    return cast("dict[str, Any]", read_json(Path(str(resources.files("hasten"))) / "data" / "devices.json"))


def _from_entry(name: str, entry: dict[str, Any], table: dict[str, Any]) -> Device:
    facts = table["defaults"] | entry
    try:
        return Device(
            name=name,
            title=facts["title"],
            memory=int(facts["memory_gb"] * 1e9),
            product=_rates(facts, facts["product_share"]),
            attention=_rates(facts, facts["attention_share"]),
            convolution=_rates(facts, facts["convolution_share"]),
            bandwidth=facts["bandwidth_gbs"] * 1e9 * facts["bandwidth_share"],
            pass_share=facts["pass_share"],
            fused_share=facts["fused_share"],
            host_link=facts["host_link_gbs"] * 1e9 * facts["host_link_share"],
            processors=facts["processors"],
            reserve=int(facts["reserve_mib"]) * 2**20,
            workspace=int(facts["workspace_mib"]) * 2**20,
            overlaps=facts["overlaps"],
            float8=facts["float8"],
            basis=facts["basis"],
            source=facts["source"],
            **{f"{what}_seconds": facts[f"{what}_us"] * 1e-6 for what in _HOST},
        )
    except KeyError as error:
        raise HastenError(f"The entry of the device {name} lacks {error}.") from None


_HOST = ("kernel", "launch", "view", "module", "graph")


def _rates(facts: dict[str, Any], share: float) -> dict[str, float]:
    # Products in float32 do not use tensor cores, unless told to; attention and convolutions fare alike.
    single = min(share, facts["float32_share_at_most"])
    return {"half": facts["half_tflops"] * 1e12 * share, "float32": facts["float32_tflops"] * 1e12 * single}
