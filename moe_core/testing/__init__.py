"""For authors of backends: the conformance kit, and virtual ranks (W ranks in one process, with faults on demand).

Needs nothing but torch; the `…Conformance` classes need pytest (`pip install "moe-core[testing]"`), the command
`moe-core conformance` does not.
"""

from moe_core.interfaces import Candidate
from moe_core.testing.case import Case, Outcome, Report, Result, Skip, Tier, Violation, run_case, run_cases
from moe_core.testing.conformance import (
    ExpertsConformance,
    PrepareFinalizeConformance,
    QuantMethodConformance,
    RouterConformance,
    RunnerConformance,
    Suite,
    registered,
    suites,
)
from moe_core.testing.virtual import (
    Faults,
    RankDropped,
    RankFault,
    VirtualGroup,
    VirtualStore,
    run_on_ranks,
)

__all__ = [
    "Candidate",
    "Case",
    "ExpertsConformance",
    "Faults",
    "Outcome",
    "PrepareFinalizeConformance",
    "QuantMethodConformance",
    "RankDropped",
    "RankFault",
    "Report",
    "Result",
    "RouterConformance",
    "RunnerConformance",
    "Skip",
    "Suite",
    "Tier",
    "Violation",
    "VirtualGroup",
    "VirtualStore",
    "registered",
    "run_case",
    "run_cases",
    "run_on_ranks",
    "suites",
]
