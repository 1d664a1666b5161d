# tests/test_conformance.py
from moe_core.testing import ExpertsConformance, PrepareFinalizeConformance, registered


class TestGatherAll(PrepareFinalizeConformance):
    def backend(self):
        return registered("dispatch", "gather_all")


class TestLoop(ExpertsConformance):
    def backend(self):
        return registered("experts", "acme_loop")
