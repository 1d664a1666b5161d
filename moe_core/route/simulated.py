"""A router for load tests: chooses experts by a named distribution and ignores what the logits say.

Shape letters: T tokens on this rank · E experts, global · K top-k.
"""

from __future__ import annotations

from typing import Final

import attrs
import torch

from moe_core.config import MoEConfig
from moe_core.interfaces import Router
from moe_core.route.params import Param, read_params
from moe_core.types import Routing

DISTRIBUTIONS: Final = ("uniform", "skewed", "one_expert")
_LOW_32_BITS: Final = 0xFFFFFFFF


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_KNOWN = {
    "distribution": Param("uniform", ", ".join(map(repr, DISTRIBUTIONS)), lambda value: value in DISTRIBUTIONS),
    "seed": Param(0, "int >= 0", lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0),
    "exponent": Param(
        None, "a number > 0, with distribution 'skewed' only", lambda value: _is_number(value) and value > 0
    ),
}


@attrs.frozen
class SimulatedRouter(Router):
    """Draws K different experts for each row, the same ones for the same seed and row number.

    The noise is a hash of (seed, row, expert), not a random generator: there is no state, so a captured graph, another
    batch size and a second process draw the same, and nothing is read back to the host. Every step draws the same too.

    Attributes:
        top_k: K.
        distribution: "uniform": every expert is as likely as any other. "skewed": expert e is drawn with a weight of
            (e + 1)^-exponent, without replacement, so that low ids are busy (under linear placement all on the first
            rank). "one_expert": every row chooses expert seed mod E first; as ids must differ, its successors (mod E)
            are the other K - 1 choices of every row.
        seed: of the noise.
        exponent: of "skewed"; 0 would be uniform.
    """

    top_k: int
    distribution: str = "uniform"
    seed: int = 0
    exponent: float = 1.0

    @classmethod
    def from_config(cls, config: MoEConfig) -> SimulatedRouter:
        params = read_params("simulated", config, _KNOWN)
        exponent = params["exponent"]
        if exponent is not None and params["distribution"] != "skewed":
            raise ValueError(
                f"router 'simulated': exponent = {exponent!r} with distribution {params['distribution']!r}; legal "
                "with distribution 'skewed' only"
            )
        return cls(config.top_k, params["distribution"], params["seed"], 1.0 if exponent is None else float(exponent))

    def select_experts(self, router_logits: torch.Tensor, correction_bias: torch.Tensor | None = None) -> Routing:
        if correction_bias is not None:
            raise ValueError(
                f"router 'simulated' was given a correction bias of shape {tuple(correction_bias.shape)}; it ignores "
                "the logits, so a bias means nothing to it: build the layer without one"
            )
        num_tokens, num_experts = router_logits.shape
        expert_E = torch.arange(num_experts, device=router_logits.device)
        if self.distribution == "one_expert":
            first = self.seed % num_experts
            simulated_TE = -((expert_E - first) % num_experts).float().expand(num_tokens, num_experts)
        else:
            simulated_TE = _gumbel_noise(num_tokens, expert_E, self.seed)
            if self.distribution == "skewed":
                simulated_TE = simulated_TE - self.exponent * torch.log(expert_E + 1.0)
        # The top-k of log-weights plus Gumbel noise is a draw without replacement by those weights.
        best = simulated_TE.topk(self.top_k, dim=-1)
        return Routing(best.indices, torch.softmax(best.values, dim=-1))


def _gumbel_noise(num_tokens: int, expert_E: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard Gumbel noise `[T, E]` float32: a function of (seed, row, expert) alone."""
    row_T = torch.arange(num_tokens, device=expert_E.device)
    seed_1 = torch.full((1,), seed & _LOW_32_BITS, dtype=torch.int64, device=expert_E.device)
    bits_TE = _hash_32(_hash_32(_hash_32(seed_1) + row_T).unsqueeze(-1) + expert_E)
    # 23 bits and a half: exact in float32 and strictly between 0 and 1, so both logarithms are finite.
    uniform_TE = ((bits_TE >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform_TE))


def _hash_32(values: torch.Tensor) -> torch.Tensor:
    """Scramble non-negative integers to 32 bits, in int64. Both factors are below 2^31, so no product overflows.

    The shifts and factors are a published pair with low bias, from a search over hashes of this form.
    """
    values = values & _LOW_32_BITS
    values = ((values ^ (values >> 16)) * 0x21F0AAAD) & _LOW_32_BITS
    values = ((values ^ (values >> 15)) * 0x735A2D97) & _LOW_32_BITS
    return values ^ (values >> 15)
