"""What `moe-core tune` measured on this machine: one file per layer in the user's cache, read once when a plan is made.

A file holds, per activation format, the experts backends' times at some row bounds and the launch parameters that each
backend found best. It is rewritten whole after every measurement, so an interrupted run loses nothing. Whatever is
wrong with one (damaged, other versions) is a complaint that `explain` shows, never an error: plans are then made as if
it were not there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import attrs

from moe_core.config import Problem
from moe_core.errors import MoEError
from moe_core.types import ActivationFormat

FILE_VERSION = 1
_INVALIDATING = ("torch", "triton")
"""Packages whose versions every measurement depends on. A backend's own version is in its label."""

LaunchTable = tuple[tuple[int, Any], ...]
"""(row bound, what the backend's `launch_search` found best there, as JSON), rising."""


@attrs.frozen
class TunedPoint:
    """One row bound, at which every experts backend that fits was tried.

    Attributes:
        rows: T in STANDARD format, C in BATCHED.
        microseconds: backend's label → median time of the experts' part of a step.
        failures: backend's label → why it got no time.
    """

    rows: int
    microseconds: Mapping[str, float]
    failures: Mapping[str, str] = attrs.field(factory=dict)

    def knows(self, label: str) -> bool:
        return label in self.microseconds or label in self.failures


@attrs.frozen
class TunedFormat:
    """What was measured of one layer in one activation format: points, rising, and launch tables by backend's label."""

    points: tuple[TunedPoint, ...] = ()
    launch: Mapping[str, LaunchTable] = attrs.field(factory=dict)

    def with_point(self, point: TunedPoint) -> TunedFormat:
        others = [item for item in self.points if item.rows != point.rows]
        return attrs.evolve(self, points=tuple(sorted([*others, point], key=lambda item: item.rows)))

    def with_launch(self, label: str, rows: int, value: Any) -> TunedFormat:
        others = [item for item in self.launch.get(label, ()) if item[0] != rows]
        table = tuple(sorted([*others, (rows, value)], key=lambda item: item[0]))
        return attrs.evolve(self, launch={**self.launch, label: table})


@attrs.frozen
class Tuned:
    """One layer's measurements, or why there are none.

    Attributes:
        formats: by activation format.
        source: the file.
        date: of the last measurement, as YYYY-MM-DD.
        complaint: why a file that is there is not used; "": it is used, or there is none.
    """

    formats: Mapping[ActivationFormat, TunedFormat] = attrs.field(factory=dict)
    source: str = ""
    date: str = ""
    complaint: str = ""

    def of(self, activation_format: ActivationFormat) -> TunedFormat:
        return self.formats.get(activation_format, TunedFormat())


NOT_TUNED = Tuned()


def cache_folder() -> Path | None:
    """Where this user's tables lie; None: platformdirs is not installed, without which `moe-core tune` writes none."""
    try:
        import platformdirs  # noqa: PLC0415 - of the extra `cli`
    except ImportError:
        return None
    return Path(platformdirs.user_cache_dir("moe-core", appauthor=False)) / "tuned"


def tuned_file(problem: Problem, folder: Path) -> Path:
    """The file of a layer: all that its times depend on is in the name, or in the hash at its end."""
    key = _key(problem)
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    shape = "E{num_experts}-K{top_k}-H{hidden_size}-I{intermediate_size}-{dtype}-{scheme}".format(**key)
    return folder / _plain(key["device"]) / f"{_plain(shape)}-{digest}.json"


def read_tuned(problem: Problem) -> Tuned:
    """What was measured for a layer. Reads one file; a missing one is `NOT_TUNED`, a useless one says why."""
    folder = cache_folder()
    if folder is None:
        return NOT_TUNED
    file = tuned_file(problem, folder)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return NOT_TUNED
    except OSError as error:
        return Tuned(source=str(file), complaint=f"{file} cannot be read ({error.strerror}); it is ignored")
    try:
        stored = json.loads(text)
        version, versions = stored["file_version"], dict(stored["versions"])
        formats = {ActivationFormat(name): _format(value) for name, value in stored["formats"].items()}
        date = str(stored["date"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a file that is JSON may still be anything
        return Tuned(
            source=str(file),
            complaint=f"{file} is damaged ({type(error).__name__}: {error}); it is ignored: delete it, or run "
            "moe-core tune again",
        )
    if (version, versions) != (FILE_VERSION, _versions()):
        return Tuned(
            source=str(file),
            complaint=f"{file} was measured with {_shown(versions)}, and here is {_shown(_versions())}; it is ignored: "
            "run moe-core tune again",
        )
    return Tuned(formats, str(file), date)


def write_tuned(problem: Problem, tuned: Tuned) -> Path:
    """Store a layer's measurements in place of those that were there; the file is whole at every moment.

    Raises:
        MoEError: platformdirs is not installed.
    """
    folder = cache_folder()
    if folder is None:
        raise MoEError('the table of measurements has no place without platformdirs: pip install "moe-core[cli]"')
    file = tuned_file(problem, folder)
    stored = {
        "file_version": FILE_VERSION,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "layer": _key(problem),
        "versions": _versions(),
        "formats": {
            format_.value: {
                "points": [attrs.asdict(point) for point in measured.points],
                "launch": measured.launch,
            }
            for format_, measured in tuned.formats.items()
        },
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(stored, indent=1), encoding="utf-8")
    os.replace(unfinished, file)
    return file


def _key(problem: Problem) -> dict[str, Any]:
    config = problem.config
    return {
        "device": problem.device.name or problem.device.type,
        "num_experts": problem.num_local_experts,
        "of_experts": config.num_experts,  # with more elsewhere, a token has fewer of its K choices here
        "top_k": config.top_k,
        "hidden_size": config.experts_hidden_size,
        "intermediate_size": problem.local_intermediate_size,
        "dtype": str(config.dtype).removeprefix("torch."),
        "activation": str(config.activation),
        "router_weight_on_input": config.router_weight_on_input,
        "scheme": problem.scheme.name,
    }


def _format(stored: Mapping[str, Any]) -> TunedFormat:
    points = tuple(
        TunedPoint(
            int(point["rows"]),
            {str(label): float(value) for label, value in point["microseconds"].items()},
            {str(label): str(reason) for label, reason in point["failures"].items()},
        )
        for point in stored["points"]
    )
    launch = {
        str(label): tuple((int(rows), value) for rows, value in table) for label, table in stored["launch"].items()
    }
    return TunedFormat(points, launch)


def _versions() -> dict[str, str]:
    found = {}
    for package in _INVALIDATING:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def _shown(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown versions"


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-")
