"""The conformance kit, over the emulation: it holds the adapter to its claims, and says nothing of the library."""

from __future__ import annotations

from typing import Any

from moe_core.interfaces import Candidate
from moe_core.testing import PrepareFinalizeConformance
from moe_mori import emulation


class TestMori(PrepareFinalizeConformance):
    ranks = 2

    def backend(self) -> Any:
        return Candidate(
            name="mori_emulated",
            plugin="moe-mori",
            factory=emulation.make_emulated,
            capabilities=emulation.capabilities(),
        )
