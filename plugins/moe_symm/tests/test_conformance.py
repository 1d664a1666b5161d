"""The conformance kit, over the emulation: it holds the plugin's Python and the protocol to the contract."""

from __future__ import annotations

from typing import Any

from moe_core.interfaces import Candidate
from moe_core.testing import PrepareFinalizeConformance
from moe_symm import emulation


class TestSymm(PrepareFinalizeConformance):
    ranks = 2

    def backend(self) -> Any:
        return Candidate(
            name="symm_emulated",
            plugin="moe-symm",
            factory=emulation.make_emulated,
            capabilities=emulation.capabilities(),
        )
