"""The dispatch that stays at home: tokens are where they are, only ids change their names.

Shape letters: T tokens on this rank · H hidden · E experts, global · K top-k.
"""

from __future__ import annotations

import attrs
import torch

from moe_core.config import Problem
from moe_core.errors import MoEError
from moe_core.footprint import payload_row_bytes, quantizing_bytes
from moe_core.interfaces import PrepareAndFinalize
from moe_core.quant import UNQUANTIZED, QuantScheme
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched, DispatchFootprint, Routing
from moe_core.wire import payload_spec, quantize_rows


@attrs.define
class _Handle:
    consumed: bool = False


class LocalPrepareAndFinalize(PrepareAndFinalize):
    """STANDARD format, R = T. Moves nothing, quantizes nothing, communicates nothing.

    With more than one expert-parallel rank, every rank has the same tokens and runs its own experts on them; the sum
    over ranks is the runner's.

    Args:
        scheme: of the layer. The plans of dispatch `local` carry the model dtype alone; this is for backends that move
            nothing where nothing has to move, and whose experts are promised rows of the scheme's all the same.
    """

    def __init__(self, scheme: QuantScheme = UNQUANTIZED) -> None:
        self.scheme = scheme

    def prepare(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        *,
        num_experts: int,
        expert_map: torch.Tensor | None,
        payload: str,
    ) -> Dispatched:
        """Pass `hidden_states` `[T, H]` through; ids `[T, K]` become local ids, -1 for experts of other ranks.

        Without an `expert_map` no kernel is launched: the tensors that come in are those that go out.
        """
        spec = payload_spec(payload, self.scheme, "local")
        ids = routing.topk_ids
        if expert_map is not None:
            ids = local_ids(ids, expert_map)
        if spec is not None:
            x, scale = quantize_rows(hidden_states, spec)
            return Dispatched(x=x, x_scale=scale, handle=_Handle(), topk_ids=ids, topk_weights=routing.topk_weights)
        x = hidden_states if hidden_states.stride(-1) == 1 else hidden_states.contiguous()
        return Dispatched(x=x, handle=_Handle(), topk_ids=ids, topk_weights=routing.topk_weights)

    def expert_output(self, dispatched: Dispatched, out: torch.Tensor) -> torch.Tensor | None:
        """The experts write the layer's output themselves, so `finalize` has nothing to copy."""
        return out

    def finalize(self, expert_out: torch.Tensor, handle: object, routing: Routing, out: torch.Tensor) -> None:
        """`expert_out` `[T, H]` is the result already; it is copied only if it isn't `out` itself."""
        if not isinstance(handle, _Handle) or handle.consumed:
            raise MoEError(
                f"dispatch local: finalize got handle = {handle!r}; it takes the handle of one prepare, exactly once"
            )
        handle.consumed = True
        if expert_out is not out and expert_out.data_ptr() != out.data_ptr():
            out.copy_(expert_out)


def footprint(problem: Problem, payload: str, tokens: int) -> DispatchFootprint:
    """Nothing but local ids, where there are other ranks, and the rows of a quantized payload."""
    maps = problem.parallel.ep_size > 1
    rows = 0 if payload == MODEL_DTYPE_PAYLOAD else sum(payload_row_bytes(problem, payload))
    held = tokens * ((problem.config.top_k * torch.int32.itemsize if maps else 0) + rows)
    return DispatchFootprint(
        rows=tokens,
        held_bytes=held,
        scratch_bytes=max(quantizing_bytes(problem, payload, tokens) - held, 0),
        own_output=True,
    )


def local_ids(ids: torch.Tensor, expert_map: torch.Tensor) -> torch.Tensor:
    """Global ids `[T, K]` → int32 local ids `[T, K]`. -1 stays -1; it is masked before it could index the map's end."""
    mapped = expert_map[ids.clamp(min=0)]
    return mapped.masked_fill_(ids < 0, -1)
