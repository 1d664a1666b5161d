"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click
import torch

from moe_core.cli.devices import SHEETS, Sheet
from moe_core.types import Device

_DESCRIBED = re.compile(r"cuda:(\d+)\.(\d+)")

dispatch_option: Callable[[Any], Any] = click.option(
    "--dispatch", metavar="NAME", help="Insist on this dispatch backend; refused with every reason if it can't run."
)
experts_option: Callable[[Any], Any] = click.option(
    "--experts", metavar="NAME", help="Insist on this experts backend; refused with every reason if it can't run."
)
json_option: Callable[[Any], Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON, for machines.")


def described_device(value: str | None) -> Device | None:
    """A device to plan for, here or not: "cpu", "cuda" (the one here), "cuda:9.0" (by compute capability), "h200"."""
    if value is None:
        return None
    if sheet := described_sheet(value):
        return sheet.device
    if match := _DESCRIBED.fullmatch(value):
        major, minor = int(match[1]), int(match[2])
        return Device("cuda", (major, minor), f"a CUDA device of compute capability {major}.{minor}")
    return Device.of(real_device(value))


def described_sheet(value: str | None) -> Sheet | None:
    """What is known of a device that is named, as "h200" or as its driver names it; None: no such name."""
    wanted = (value or "").lower()
    return next((sheet for name, sheet in SHEETS.items() if wanted in (name, sheet.device.name.lower())), None)


def real_device(value: str | None) -> torch.device:
    """A device of this machine; None: "cuda" where there is one, else "cpu".

    Raises:
        ValueError: it is not here.
    """
    if value is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(value)
    except RuntimeError as error:
        names = ", ".join(SHEETS)
        raise ValueError(
            f"--device {value!r}: {str(error).splitlines()[0]}; pass cpu or cuda (or, to plan: {names})"
        ) from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {value!r}: moe-core runs on cpu and cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {value!r}: torch sees no CUDA device here (see moe-core doctor); pass cpu")
    return device
