"""The kit's two doors: classes that an author's tests derive from, and `suites` for the command line.

    from moe_core.testing import PrepareFinalizeConformance, registered

    class TestRing(PrepareFinalizeConformance):
        def backend(self):
            return registered("dispatch", "ring")

That is a whole test module. The cases follow from what the backend declares; none is written, and none can be
overridden: what is known to fail is listed in `xfail` with its reason, and fails as soon as it passes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import attrs
import torch

from moe_core.errors import UnsupportedError
from moe_core.plugins import registry
from moe_core.testing.case import Case, Outcome, check_xfail, run_case
from moe_core.testing.dispatch import dispatch_cases
from moe_core.testing.experts import experts_cases
from moe_core.testing.launched import join
from moe_core.testing.quant import quant_cases
from moe_core.testing.router import router_cases
from moe_core.testing.runner import runner_cases

KINDS: Mapping[str, str] = {
    "dispatch": "dispatch",
    "experts": "experts",
    "scheme": "quant_methods",
    "router": "routers",
    "runner": "runners",
}
"""What `moe-core plugins` calls a thing → where the registry keeps it."""


def registered(kind: str, name: str) -> Any:
    """What an installed plugin registered: `registered("dispatch", "ring")`. Kinds are those of `KINDS`.

    Raises:
        UnsupportedError: there is none of that name; the text lists those that there are.
    """
    if kind not in KINDS:
        raise ValueError(f"registered({kind!r}, {name!r}): kinds are {', '.join(KINDS)}")
    return registry().find(KINDS[kind], name)


class _Conformance:
    """One test per case."""

    device: ClassVar[str | None] = None
    """Where the cases run; None: on the CPU where the backend does, else on "cuda"."""
    ranks: ClassVar[int] = 4
    """The largest number of virtual ranks to try."""
    xfail: ClassVar[Mapping[str, str]] = {}
    """Name of a case → why it is known to fail."""

    def cases(self) -> list[Case]:
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """pytest asks this when it collects; nothing here needs pytest to be installed."""
        if "case" in metafunc.fixturenames:
            cases = self.cases()
            check_xfail(cases, self.xfail)
            metafunc.parametrize("case", cases, ids=[case.name for case in cases])

    def test_conforms(self, case: Case) -> None:
        import pytest  # noqa: PLC0415 - an extra, and only pytest calls this

        result = run_case(case, self.xfail)
        if result.outcome is Outcome.SKIPPED:
            pytest.skip(result.text)
        if result.outcome is Outcome.XFAILED:
            pytest.xfail(result.text)
        if result.bad:
            pytest.fail(
                f"{result.duty}: {result.text}\n(case {case.name!r}, {case.tier.value}, of {case.claim})", pytrace=False
            )


class PrepareFinalizeConformance(_Conformance):
    """Subclass it as `Test…`, and return the dispatch backend."""

    def backend(self) -> Any:
        """A `Candidate`: `registered("dispatch", name)`, or made by hand from a factory and capabilities."""
        raise NotImplementedError(f"{type(self).__name__}.backend() must return the dispatch backend to be tested")

    def cases(self) -> list[Case]:
        backend = self.backend()
        return dispatch_cases(backend, device=self.device or device_for(backend), ranks=self.ranks)


class ExpertsConformance(_Conformance):
    """Subclass it as `Test…`, and return the experts backend."""

    def backend(self) -> Any:
        """A `Candidate`: `registered("experts", name)`, or made by hand from a factory and capabilities."""
        raise NotImplementedError(f"{type(self).__name__}.backend() must return the experts backend to be tested")

    def cases(self) -> list[Case]:
        backend = self.backend()
        return experts_cases(backend, device=self.device or device_for(backend))


class QuantMethodConformance(_Conformance):
    """Subclass it as `Test…`, and return the quantization method."""

    def backend(self) -> Any:
        """A `QuantMethodEntry`: `registered("scheme", name)`, or made by hand."""
        raise NotImplementedError(f"{type(self).__name__}.backend() must return the quantization method to be tested")

    def cases(self) -> list[Case]:
        return quant_cases(self.backend(), device=self.device or "cpu")


class RouterConformance(_Conformance):
    """Subclass it as `Test…`, and return the router's factory."""

    params: ClassVar[Mapping[str, Any]] = {}
    """Its parameters, where it doesn't run without."""

    def backend(self) -> Any:
        """`registered("router", name)`, or a factory: (MoEConfig) → Router."""
        raise NotImplementedError(f"{type(self).__name__}.backend() must return the router's factory")

    def cases(self) -> list[Case]:
        told = type(self).reference is not RouterConformance.reference
        reference = self.reference if told else None
        return router_cases(self.backend(), params=self.params, reference=reference, device=self.device or "cpu")

    def reference(self, logits: torch.Tensor, top_k: int) -> torch.Tensor:
        """What it computes: float64 logits `[T, E]` → dense weights `[T, E]`, zero where an expert is not chosen.

        Without it the numbers are not compared, only what the interface promises.
        """
        raise NotImplementedError


class RunnerConformance(_Conformance):
    """Subclass it as `Test…`, and return the runner's factory."""

    def backend(self) -> Any:
        """`registered("runner", name)`, or a factory that takes what `MoERunner` takes."""
        raise NotImplementedError(f"{type(self).__name__}.backend() must return the runner's factory")

    def cases(self) -> list[Case]:
        return runner_cases(self.backend(), device=self.device or "cpu")


def device_for(candidate: Any) -> str:
    """The CPU where the backend runs on it: there memory is poisoned. Else its own device."""
    return "cpu" if "cpu" in candidate.capabilities.device_types else "cuda"


@attrs.frozen
class Suite:
    """All cases for one registered thing.

    Attributes:
        subject: for the head of the report.
        device: where they run.
        cases: what is asked.
    """

    subject: str
    device: str
    cases: tuple[Case, ...]


def suites(
    name: str, *, device: str | None = None, ranks: int = 4, params: Mapping[str, Any] | None = None
) -> list[Suite]:
    """What `moe-core conformance NAME` runs: every registered thing called `name`, or the one of "kind:name".

    Args:
        name: as in `moe-core plugins`.
        device: where the cases run; None: the CPU, where the backend runs on it.
        ranks: the largest number of virtual ranks to try.
        params: of a router that doesn't run without.

    Raises:
        UnsupportedError: nothing is called so.
    """
    kind, _, rest = name.rpartition(":")
    if kind and kind not in KINDS:
        raise UnsupportedError(f"unknown kind {kind!r} in {name!r}; kinds are {', '.join(KINDS)}")
    found = registry()
    asked = [kind] if kind else [k for k, place in KINDS.items() if rest in getattr(found, place)]
    if not asked:
        known = [f"{k}:{n}" for k, place in KINDS.items() for n in sorted(getattr(found, place))]
        close = difflib.get_close_matches(rest, [each.partition(":")[2] for each in known], n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        nothing = f"nothing is registered under the name {name!r}{meant}; there are: {', '.join(known)}"
        raise UnsupportedError("\n".join([nothing, *found.not_loaded()]))
    return [_suite(k, rest, device, ranks, params) for k in asked]


def launched_suite(name: str, timeout_s: float) -> tuple[Suite, int]:
    """The dispatch backend `name` on the ranks that a launcher started, and which of them this process is.

    Args:
        name: as in `moe-core plugins`.
        timeout_s: how long a collective waits for the other ranks.
    """
    entry = registered("dispatch", name.removeprefix("dispatch:"))
    group, device = join(timeout_s)
    cases = dispatch_cases(entry, device=device, launched=group)
    return Suite(f"dispatch {entry.label} on {group.size} processes", str(device), tuple(cases)), group.rank


def _suite(kind: str, name: str, device: str | None, ranks: int, params: Mapping[str, Any] | None) -> Suite:
    entry = registered(kind, name)
    makers: Mapping[str, Callable[[str], list[Case]]] = {
        "dispatch": lambda where: dispatch_cases(entry, device=where, ranks=ranks),
        "experts": lambda where: experts_cases(entry, device=where),
        "scheme": lambda where: quant_cases(entry, device=where),
        "router": lambda where: router_cases(entry, params=params, device=where),
        "runner": lambda where: runner_cases(entry, device=where),
    }
    where = device or (device_for(entry) if kind in ("dispatch", "experts") else "cpu")
    if torch.device(where).type == "cuda" and not torch.cuda.is_available():
        where = "cpu"  # declarations can still be asked; the cases that compute say why they were skipped
    plugin = getattr(entry, "plugin", "")
    return Suite(f"{kind} {name}{f' ({plugin})' if plugin else ''}", where, tuple(makers[kind](where)))
