"""Do all ranks of a layer have the same plan? Asked once, when a kernel is built, before the first collective.

Fingerprints go through the group's key-value store and not through a collective: a collective between ranks that
disagree is the very thing that hangs.

Shape letters: W ranks.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from moe_core.errors import MoEError
from moe_core.interfaces import Group

ABSENCE_TIMEOUT_S = 300.0
"""How long a rank that has not built the layer yet is waited for, unless the group says otherwise (`timeout_s`)."""
DISAGREEMENT_TIMEOUT_S = 5.0
"""Once two ranks are known to differ, how long the others are waited for, to be told of in the same error."""


def check_agreement(group: Group, fingerprint: Mapping[str, Any], advice: Mapping[str, Any] | None = None) -> None:
    """Compare this rank's plan with those of all others. Every rank of the group calls this, layer by layer.

    Args:
        group: the layer's ranks. Its `store` is used as `torch.distributed.Store` is.
        fingerprint: what must be equal on all ranks; whatever JSON can hold.
        advice: what had better be equal (tuned tables): a difference is a warning.

    Raises:
        MoEError: on every rank, with each differing field and its value per rank; or a rank did not come.
    """
    if group.size == 1:
        return
    store, size = group.store, group.size
    # The store counts the layers, so that two objects over the same ranks do not use a key twice.
    layer = store.add(f"moe_core/layers/{group.rank}", 1)
    mine = {"plan": _plain(fingerprint), "advice": _plain(advice or {})}
    store.set(f"moe_core/plan/{layer}/{group.rank}", json.dumps(mine))
    patience = float(getattr(group, "timeout_s", ABSENCE_TIMEOUT_S))
    deadline = time.monotonic() + patience
    plans: dict[int, Any] = {group.rank: mine}
    absent: list[int] = []
    for rank in (r for r in range(size) if r != group.rank):
        if (told := _read(store, f"moe_core/plan/{layer}/{rank}", deadline)) is None:
            absent.append(rank)
            continue
        plans[rank] = told
        if told["plan"] != mine["plan"]:
            deadline = min(deadline, time.monotonic() + DISAGREEMENT_TIMEOUT_S)
    if difference := differences({rank: told["plan"] for rank, told in plans.items()}):
        raise MoEError(
            f"the ranks of this layer (number {layer} of this group) have different plans; give all ranks the same "
            f"configuration and packages:\n{difference}"
        )
    if absent:
        who = f"rank {absent[0]} has" if len(absent) == 1 else f"ranks {absent} have"
        raise MoEError(
            f"rank {group.rank}, building layer number {layer} of this group: {who} not built it within {patience} s, "
            "so the plans can't be compared; is it running, and does it build the same layers in the same order?"
        )
    if hint := differences({rank: told["advice"] for rank, told in plans.items()}):
        warnings.warn(f"the ranks of this layer differ, which may cost speed but no numbers:\n{hint}", stacklevel=2)


def differences(plans: Mapping[int, Mapping[str, Any]]) -> str:
    """One line per field that is not the same on all ranks, with its value on each; empty: there is none."""
    fields = sorted({field for plan in plans.values() for field in plan})
    lines = []
    for field in fields:
        values = {rank: plan.get(field) for rank, plan in sorted(plans.items())}
        if any(value != values[min(values)] for value in values.values()):
            lines.append(f"  {field}: " + ", ".join(f"rank {rank} has {value!r}" for rank, value in values.items()))
    return "\n".join(lines)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As it looks after the way through JSON, so that a tuple equals the list that it becomes."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(values), default=str))
    return plain


def _read(store: Any, key: str, deadline: float) -> Any | None:
    """The record, or None if it is not there by then."""
    try:
        # at least a moment, so that what is there already is read
        store.wait([key], timedelta(seconds=max(deadline - time.monotonic(), 0.05)))
    except (RuntimeError, TimeoutError):  # torch's stores raise their DistStoreError, a RuntimeError
        return None
    return json.loads(store.get(key))
