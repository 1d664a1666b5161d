"""The conformance kit, over the emulation: it holds the adapter to its claims, and says nothing of the library."""

from __future__ import annotations

from typing import Any

from moe_core.interfaces import Candidate
from moe_core.testing import PrepareFinalizeConformance
from moe_nixl_ep import emulation


class TestNixlEP(PrepareFinalizeConformance):
    ranks = 2

    def backend(self) -> Any:
        return Candidate(
            name="nixl_ep_emulated",
            plugin="moe-nixl-ep",
            factory=emulation.make_emulated,
            capabilities=emulation.capabilities(),
        )
