"""Devices that a plan can be made for without having them, and the floors of a step's time on them.

Every number says where it is from: the maker's public data sheet (peak, dense, no sparsity), or this project's own
measured ceiling, which the H200 alone has. A floor from a peak is lower than one from a measured ceiling: compare
candidates on one device, not devices with each other.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch

from moe_core.planner import Cost
from moe_core.quant import QuantScheme
from moe_core.types import Device

GB, TERA = 1e9, 1e12
_MEASURED = "measured by this project on one H200 (copy, 8192³ matmuls, 256 MiB peer copy)"
_NETWORK = "400 Gb/s per GPU, as the makers' reference servers have"


@attrs.frozen
class Figure:
    """A number and where it is from."""

    value: float
    source: str


@attrs.frozen(kw_only=True)
class Sheet:
    """What is known of a device.

    Attributes:
        device: as selection sees it.
        memory: bytes.
        memory_rate: bytes/s, read and written together.
        matmul: FLOP/s by the element type of the operands: "bf16" (fp16 too), "fp8", "fp4" where it has one.
        link_rate: bytes/s that one GPU receives from the others of its server.
        network_rate: bytes/s that one GPU receives from other servers.
        gpus_per_server: of one link domain.
        mesh: each pair of GPUs has a link of its own, so that fewer GPUs use fewer links; if not, a switch.
    """

    device: Device
    memory: Figure
    memory_rate: Figure
    matmul: Mapping[str, Figure]
    link_rate: Figure
    network_rate: Figure = Figure(50 * GB, _NETWORK)
    gpus_per_server: int = 8
    mesh: bool = False

    def figures(self) -> dict[str, Figure]:
        """Every number with its source, by what it is, in units that people read."""
        rates = {f"{kind} matmul (TFLOP/s)": attrs.evolve(f, value=f.value / TERA) for kind, f in self.matmul.items()}
        return {
            "memory (GB)": attrs.evolve(self.memory, value=self.memory.value / GB),
            "memory traffic (TB/s)": attrs.evolve(self.memory_rate, value=self.memory_rate.value / TERA),
            **rates,
            f"links in a server of {self.gpus_per_server} (GB/s, one way)": attrs.evolve(
                self.link_rate, value=self.link_rate.value / GB
            ),
            "network (GB/s, one way)": attrs.evolve(self.network_rate, value=self.network_rate.value / GB),
        }


def _sheet(
    name: str, capability: tuple[int, int], source: str, memory: float, rate: float, links: float, **matmul: float
) -> Sheet:
    """All from one data sheet: GB, TB/s, GB/s into one GPU, TFLOP/s. `name`: as the driver gives it."""
    return Sheet(
        device=Device("cuda", capability, name),
        memory=Figure(memory * GB, source),
        memory_rate=Figure(rate * TERA, source),
        matmul={kind: Figure(value * TERA, source) for kind, value in matmul.items()},
        link_rate=Figure(links * GB, source),
    )


_H200 = _sheet("NVIDIA H200", (9, 0), "NVIDIA H200 data sheet (SXM)", 141, 4.8, 450, bf16=989.5, fp8=1979)

SHEETS: Mapping[str, Sheet] = {
    "h100": _sheet(
        "NVIDIA H100 80GB HBM3", (9, 0), "NVIDIA H100 data sheet (SXM)", 80, 3.35, 450, bf16=989.5, fp8=1979
    ),
    "h200": attrs.evolve(
        _H200,
        memory_rate=Figure(4.26 * TERA, _MEASURED),
        matmul={"bf16": Figure(800 * TERA, _MEASURED), "fp8": Figure(1466 * TERA, _MEASURED)},
        link_rate=Figure(391 * GB, _MEASURED),
    ),
    "b200": _sheet(
        "NVIDIA B200", (10, 0), "NVIDIA DGX B200 data sheet, per GPU", 180, 8.0, 900, bf16=2250, fp8=4500, fp4=9000
    ),
    "mi300x": attrs.evolve(
        _sheet("AMD Instinct MI300X", (9, 4), "AMD Instinct MI300X data sheet", 192, 5.3, 448, bf16=1307.4, fp8=2614.9),
        mesh=True,
    ),
}
"""By the name that people type."""


@attrs.frozen
class Times:
    """Floors of one step of one layer on one rank, in seconds; None: not to be told.

    Attributes:
        experts: reading and writing what the experts must, or multiplying, whichever takes longer.
        bound: "memory" or "compute": which of the two that is.
        wire: receiving what the dispatch and the runner's sum receive: bandwidth only, no latency.
    """

    experts: float | None
    bound: str
    wire: float | None

    @property
    def step(self) -> float | None:
        """One after the other, as a step runs where nothing is overlapped."""
        return None if self.experts is None or self.wire is None else self.experts + self.wire


def times(cost: Cost, sheet: Sheet) -> Times:
    """The floors of a cost on a device."""
    reading = cost.traffic_bytes / sheet.memory_rate.value
    rate = matmul_rate(cost.plan.scheme, cost.plan.config.dtype, sheet)
    if rate is None:
        return Times(None, "", _wire_seconds(cost, sheet))
    multiplying = cost.flops / rate.value
    return Times(
        max(reading, multiplying), "memory" if reading >= multiplying else "compute", _wire_seconds(cost, sheet)
    )


def matmul_rate(scheme: QuantScheme, dtype: torch.dtype, sheet: Sheet) -> Figure | None:
    """Of the operands that the GEMMs have; where the device lacks that type, of bf16. None: fp32, not in the sheets."""
    if scheme.activation is None and dtype is torch.float32:
        return None
    kinds = {"float8_e4m3fn": "fp8", "float4_e2m1": "fp4"}
    kind = "bf16" if scheme.activation is None else kinds.get(scheme.activation.dtype, "bf16")
    return sheet.matmul.get(kind, sheet.matmul["bf16"])


def _wire_seconds(cost: Cost, sheet: Sheet) -> float | None:
    """Uniform traffic from every rank; links and network work at the same time.

    What all ranks get of all (a gather, a sum) crosses the network once a server and is handed on over the links; what
    is meant for one rank crosses for that rank.
    """
    received = cost.wire_bytes
    if received is None:
        return None
    parallel = cost.plan.problem.parallel
    ranks = max(parallel.ep_size, parallel.tp_size)
    if ranks == 1:
        return 0.0
    near = min(ranks, sheet.gpus_per_server)
    far = (ranks - near) / (ranks - 1)
    links = sheet.link_rate.value * ((near - 1) / (sheet.gpus_per_server - 1) if sheet.mesh else 1)
    if cost.plan.dispatch.capabilities.gathers_tokens or cost.reduce_wire_bytes:
        return max(received / links, received * far / near / sheet.network_rate.value)
    return max(received * (1 - far) / links, received * far / sheet.network_rate.value)
