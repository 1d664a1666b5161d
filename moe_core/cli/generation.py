"""Greedy generation through our experts and through transformers' own, and the comparison of the two.

What `run` and `demo` share. Both sides are the very same model object, with its experts implementation switched; only
where experts are packed does a second model, of the same values, stand for transformers' side.

Shape letters: N new tokens · V vocabulary.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from moe_core.cli.measure import synchronize
from moe_core.cli.models import LoadedModel

OnToken = Callable[[], None]


@attrs.frozen(eq=False)
class Generation:
    """What one side generated.

    Attributes:
        tokens: the new ones; after an end-of-text token none follow.
        logits: `[N, V]` float32, those that each new token was chosen by.
        seconds: of each new token; the first one pays for the prompt.
    """

    tokens: list[int]
    logits: torch.Tensor
    seconds: list[float]

    @property
    def ms_per_token(self) -> float:
        """The median over the tokens after the first, where there are any."""
        return statistics.median(self.seconds[1:] or self.seconds) * 1e3


@attrs.frozen
class Comparison:
    """Ours beside transformers' own experts.

    Attributes:
        theirs: the name of transformers' implementation.
        tokens_equal: the same tokens.
        first_difference: the index of the first new token that differs; None: there is none.
        logit_difference: the largest, over all steps whose input was the same on both sides.
        our_ms, their_ms: per new token, median of the rounds.
    """

    theirs: str
    tokens_equal: bool
    first_difference: int | None
    logit_difference: float
    our_ms: float
    their_ms: float


def use_ours(loaded: LoadedModel) -> None:
    """Run the MoE blocks through their plans."""
    loaded.model.set_experts_implementation(loaded.ours)


def use_theirs(loaded: LoadedModel) -> None:
    """Run the MoE blocks through transformers' own experts."""
    loaded.model.set_experts_implementation(loaded.theirs)


def _nothing() -> None:
    return None


@torch.no_grad()
def generate(
    loaded: LoadedModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    on_token: OnToken = _nothing,
    model: Any = None,
) -> Generation:
    """Generate greedily, with whichever experts are switched on.

    Args:
        loaded: the model.
        prompt_ids: at least one id.
        max_new_tokens: at most so many; an end-of-text token ends it before.
        on_token: called at each new token.
        model: that runs; None: the loaded one.
    """
    ids = torch.tensor([list(prompt_ids)], device=loaded.device)
    clock = _Clock(loaded.device, on_token)
    result = (model or loaded.model).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=_greedy(loaded.model, max_new_tokens),
        streamer=clock,
    )
    logits = torch.cat([step.float().cpu() for step in result.logits])
    return Generation(result.sequences[0, ids.shape[1] :].tolist(), logits, clock.seconds)


def _greedy(model: Any, max_new_tokens: int) -> Any:
    """Greedy, whatever generation_config.json asks for; only its special tokens are kept."""
    from transformers import GenerationConfig  # noqa: PLC0415 - an extra

    own = model.generation_config
    end = own.eos_token_id
    first_end = end[0] if isinstance(end, list) and end else end
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        num_beams=1,
        bos_token_id=own.bos_token_id,
        eos_token_id=end,
        pad_token_id=own.pad_token_id if own.pad_token_id is not None else first_end,
    )


class _Clock:
    """A streamer of `generate`: it is called with the prompt, then with each new token."""

    def __init__(self, device: torch.device, on_token: OnToken) -> None:
        self._device, self._on_token = device, on_token
        self._last: float | None = None
        self.seconds: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
            self._on_token()
        self._last = now

    def end(self) -> None:
        return None


def compare(
    loaded: LoadedModel,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    rounds: int = 1,
    on_token: OnToken = _nothing,
) -> tuple[Generation, Comparison]:
    """Generate on both sides, each warmed up once, then in turn `rounds` times.

    Returns:
        our last generation, and the comparison. Our experts are switched on afterwards.
    """
    ours: list[Generation] = []
    theirs: list[Generation] = []
    try:
        for _ in range(1 + rounds):
            if loaded.beside is None:
                use_theirs(loaded)
            theirs.append(generate(loaded, prompt_ids, max_new_tokens, on_token, loaded.beside))
            use_ours(loaded)
            ours.append(generate(loaded, prompt_ids, max_new_tokens, on_token))
    finally:
        use_ours(loaded)
    mine, other = ours[-1], theirs[-1]
    pairs = list(zip(mine.tokens, other.tokens, strict=False))
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    comparable = len(pairs) if first is None else first + 1  # the first different token was chosen after equal input
    return mine, Comparison(
        theirs=", ".join(sorted({str(name) for name in _implementations(loaded).values()})),
        tokens_equal=mine.tokens == other.tokens,
        first_difference=first,
        logit_difference=float((mine.logits[:comparable] - other.logits[:comparable]).abs().max()),
        our_ms=statistics.median(generation.ms_per_token for generation in ours[1:]),
        their_ms=statistics.median(generation.ms_per_token for generation in theirs[1:]),
    )


def _implementations(loaded: LoadedModel) -> dict[str, str | None]:
    """What runs on transformers' side."""
    if loaded.beside is None:
        return loaded.theirs
    found: dict[str, str | None] = loaded.beside.get_experts_implementation()
    return found


@torch.no_grad()
def experts_effect(loaded: LoadedModel, ids: Sequence[int]) -> float:
    """The largest change of a logit when every experts module returns zeros: what equality of logits is worth."""
    tokens = torch.tensor([list(ids)], device=loaded.device)
    before = loaded.model(input_ids=tokens).logits.float()
    hooks = [
        loaded.model.get_submodule(name).register_forward_hook(lambda _module, _args, out: torch.zeros_like(out))
        for name in loaded.plans
    ]
    try:
        after = loaded.model(input_ids=tokens).logits.float()
    finally:
        for hook in hooks:
            hook.remove()
    return float((after - before).abs().max())
