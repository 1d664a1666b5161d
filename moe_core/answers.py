"""What a backend's own functions answer: its probe, its `refuse`, its `footprint`.

Each is asked about layers that may run without this backend. So one that raises, or answers what it must not, is a
reason against its backend, by name, and no exception of anybody else.
"""

from __future__ import annotations

from typing import Any

import attrs

from moe_core.config import Problem
from moe_core.declared import CAPABILITIES_PAGE, HOOKS_PAGE, shown
from moe_core.errors import PluginError
from moe_core.interfaces import Candidate, CapabilitiesT
from moe_core.types import Availability, DispatchCapabilities, DispatchFootprint


def probed(candidate: Candidate[CapabilitiesT]) -> Candidate[CapabilitiesT]:
    """The candidate with its probe's answer, as `select` wants it."""
    try:
        answer: Any = candidate.probe()
    except Exception as error:  # noqa: BLE001 - a probe that raises is that backend's reason, nobody else's crash
        answer = Availability(False, f"its probe raised {type(error).__name__}: {error}")
    if not isinstance(answer, Availability):
        answer = Availability(
            False, f"its probe ({candidate.plugin}) answered {shown(answer)}; expected an Availability ({HOOKS_PAGE})"
        )
    return attrs.evolve(candidate, availability=answer)


def refusal(candidate: Candidate[Any], problem: Problem) -> str | None:
    """What the candidate's `refuse` has against the layer; None: nothing, or it has none."""
    refuse = candidate.capabilities.refuse
    if refuse is None:
        return None
    try:
        answer: Any = refuse(problem)
    except Exception as error:  # noqa: BLE001 - as above
        says = f"raised {type(error).__name__}: {error}"
    else:
        if answer is None or (isinstance(answer, str) and answer.strip()):
            return answer
        says = f"answered {shown(answer)}"
    return f"its refuse ({candidate.plugin}) {says}; expected None or a reason ({CAPABILITIES_PAGE})"


def footprint_of(
    dispatch: Candidate[DispatchCapabilities], problem: Problem, payload: str, tokens: int
) -> DispatchFootprint | None:
    """The footprint that a dispatch declares at T = `tokens`; None: it declares none.

    Raises:
        PluginError: its function raised, or answered something else.
    """
    declared = dispatch.capabilities.footprint
    if declared is None:
        return None
    try:
        answer: Any = declared(problem, payload, tokens)
    except Exception as error:
        raise _bad_footprint(dispatch, tokens, f"raised {type(error).__name__}: {error}") from error
    if not isinstance(answer, DispatchFootprint):
        raise _bad_footprint(dispatch, tokens, f"answered {shown(answer)}")
    return answer


def _bad_footprint(dispatch: Candidate[DispatchCapabilities], tokens: int, says: str) -> PluginError:
    text = f"its footprint ({dispatch.plugin}) {says} at T = {tokens}; expected a DispatchFootprint (docs/plan.md)"
    return PluginError(f"dispatch {dispatch.name}: {text}")
