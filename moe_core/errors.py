"""Every exception that the core raises for a user. All derive from `MoEError`."""

from __future__ import annotations

from collections.abc import Sequence

from moe_core.types import PairReport


class MoEError(Exception):
    """Base class of what can go wrong with plugins, plans, checkpoints and steps. A bad argument is a `ValueError`."""


class PluginError(MoEError):
    """A plugin broke the plugin contract. The text names the plugin, what it did and what was expected."""


class UnsupportedError(MoEError):
    """Nothing installed can run what was asked for.

    Attributes:
        rejections: one row per (dispatch, experts) pair that was considered, each with all of its reasons; empty
            when no pair came into question (an unknown name, say).
    """

    def __init__(self, message: str, rejections: Sequence[PairReport] = ()) -> None:
        super().__init__(message)
        self.rejections = tuple(rejections)


class CapacityError(MoEError):
    """More rows arrived for an expert than its buffer holds. No result of that step may be used."""


class CollectiveError(MoEError):
    """A collective between ranks could not be completed. The text names this rank, the stage and what is known."""

    def during(self, stage: str) -> None:
        """Put the stage in front of the text: a group knows the rank and the collective, its caller what it is for."""
        self.args = (f"{stage}: {self}",)


class CheckpointError(MoEError):
    """A checkpoint folder cannot be read as it is. The text names the file or tensor and what is wrong with it."""
