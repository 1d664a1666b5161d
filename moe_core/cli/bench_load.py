"""What `moe-core bench --ep` prints: how evenly a checkpoint's experts are chosen, expert by expert and rank by rank.

Shape letters: T tokens · E experts · K top-k · W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import rich.table
import torch

from moe_core.cli.models import LoadedModel, LoadOptions, load_model
from moe_core.expert_load import ExpertLoad, imbalance
from moe_core.expert_map import ExpertMapManager
from moe_core.types import ExpertPlacement

_SEED = 0


@attrs.frozen
class LayerLoad:
    """One layer's load.

    Attributes:
        name: the experts module.
        counts: int64 `[E]`, how often each expert was chosen.
    """

    name: str
    counts: torch.Tensor

    def over_ranks(self, ranks: int, placement: ExpertPlacement) -> float:
        """The busiest rank's choices over the mean of the ranks; 1.0 is even."""
        experts = len(self.counts)
        owned = [ExpertMapManager(experts, ranks, rank, placement).local_experts for rank in range(ranks)]
        return imbalance(torch.stack([self.counts[list(own)].sum() for own in owned]))

    def to_dict(self, worlds: Sequence[int]) -> dict[str, Any]:
        return {
            "layer": self.name,
            "counts": self.counts.tolist(),
            "experts": imbalance(self.counts),
            "ranks": {
                placement.value: {
                    world: self.over_ranks(world, placement) for world in worlds if world <= len(self.counts)
                }
                for placement in ExpertPlacement
            },
        }


def measure_load(folder: Path, tokens: int, device: torch.device) -> list[LayerLoad]:
    """Run a checkpoint once, on T token ids drawn evenly from its vocabulary, and count every layer's choices."""
    loaded = load_model(folder, LoadOptions(device=device))
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(_SEED))
    return count_choices(loaded, ids.to(device))


@torch.no_grad()
def count_choices(loaded: LoadedModel, ids: torch.Tensor) -> list[LayerLoad]:
    """One forward of token ids `[1, T]`, with the choices of every layer counted where they pass."""
    from moe_core.integrations.transformers.foreign import experts_modules  # noqa: PLC0415 - needs transformers

    loads: dict[str, ExpertLoad] = {}
    hooks = []
    modules: dict[str, Any] = dict(experts_modules(loaded.model))
    for name, module in modules.items():
        load = loads[name] = ExpertLoad(int(module.num_experts), ids.device)
        hooks.append(module.register_forward_pre_hook(lambda _, given, load=load: load.add(given[1])))
    try:
        loaded.model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [LayerLoad(name, load.read().cpu()) for name, load in loads.items()]


def load_table(loads: Sequence[LayerLoad], worlds: Sequence[int], title: str) -> rich.table.Table:
    """A row for each layer: the busiest expert and the busiest rank, over the mean."""
    table = rich.table.Table(title=title, box=None, title_justify="left")
    table.add_column("layer")
    for heading in ("never chosen", "busiest expert"):
        table.add_column(heading, justify="right")
    for world in worlds:
        for placement in ExpertPlacement:
            table.add_column(f"{world} ranks, {placement.value.replace('_', ' ')}", justify="right")
    for load in loads:
        shown = [f"{int((load.counts == 0).sum())} of {len(load.counts)}", f"{imbalance(load.counts):.2f}"]
        for world in worlds:
            fits = world <= len(load.counts)
            shown += [f"{load.over_ranks(world, placement):.2f}" if fits else "–" for placement in ExpertPlacement]
        table.add_row(load.name, *shown)
    return table
