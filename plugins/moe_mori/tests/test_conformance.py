"""The conformance kit, over the emulation: it holds the adapter to its claims, and says nothing of the library."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moe_core.interfaces import Candidate
from moe_core.testing import PrepareFinalizeConformance
from moe_mori import emulation

ONE_OPERATOR = (
    "one operator serves all layers of a shape, and its buffers are single: one step at a time over all of them"
)


class TestMori(PrepareFinalizeConformance):
    ranks = 2
    xfail: ClassVar[Mapping[str, str]] = {
        "two layers, 2 ranks": ONE_OPERATOR,
    }

    def backend(self) -> Any:
        return Candidate(
            name="mori_emulated",
            plugin="moe-mori",
            factory=emulation.make_emulated,
            capabilities=emulation.capabilities(),
        )
