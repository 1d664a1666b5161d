"""What moe-symm declares to moe-core. The kernels are imported when a plan that uses them is built."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from moe_core.hookspecs import hookimpl
from moe_symm.availability import probe
from moe_symm.capabilities import BY_EXPERT, EXACT, SYMM
from moe_symm.layout import Form

moe_core_api = (1, 0)


def _make(form: Form, *arguments: Any) -> Any:
    from moe_symm import peers, prepare_finalize  # noqa: PLC0415 - only when it is used

    return prepare_finalize.make(*arguments, connect=peers.connect, form=form)


@hookimpl
def moe_core_register_prepare_finalize(register: Callable[..., None]) -> None:
    # Above `nixl_ep`: on 4 H200, up to 128 tokens a rank, whole layers were faster in all cases but one, bf16 with all
    # choices on one rank. Of buffers for many more tokens nothing was measured with experts.
    register("symm", partial(_make, Form.STANDARD), SYMM, probe, priority=((0, 30), (512, -6)))
    register("symm_batched", partial(_make, Form.BATCHED), BY_EXPERT, probe, priority=((0, 29), (512, -7)))
    register("symm_exact", partial(_make, Form.EXACT), EXACT, probe, priority=-8)
