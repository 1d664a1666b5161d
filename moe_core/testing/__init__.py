"""For tests of backends: W ranks in one process, with faults on demand. Needs nothing but torch."""

from moe_core.testing.virtual import (
    Faults,
    RankDropped,
    RankFault,
    VirtualGroup,
    VirtualStore,
    run_on_ranks,
)

__all__ = ["Faults", "RankDropped", "RankFault", "VirtualGroup", "VirtualStore", "run_on_ranks"]
