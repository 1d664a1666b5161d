"""The conformance kit, over the emulation: it holds the plugin's Python and the protocol to the contract."""

from __future__ import annotations

from typing import Any

import pytest

from moe_core.testing import PrepareFinalizeConformance
from moe_symm import emulation, layout
from moe_symm.layout import Form


class TestSymm(PrepareFinalizeConformance):
    ranks = 2

    def backend(self) -> Any:
        return emulation.candidate(Form.STANDARD)


class TestSymmWithManyTokens(TestSymm):
    @pytest.fixture(autouse=True)
    def few_are_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(layout, "BULK_FROM", 1)


class TestSymmBatched(PrepareFinalizeConformance):
    ranks = 2

    def backend(self) -> Any:
        return emulation.candidate(Form.BATCHED)


@pytest.mark.full  # but for the combine's sums, all is as in the batched form
class TestSymmExact(PrepareFinalizeConformance):
    ranks = 2

    def backend(self) -> Any:
        return emulation.candidate(Form.EXACT)
