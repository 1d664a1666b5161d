"""Makes the shared cases importable, moe-batched registered where it isn't installed, and gloo ranks to be had."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moe_core

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))


@pytest.fixture(autouse=True, scope="session")
def _batched_is_registered() -> Iterator[None]:
    from rank_cases import register_batched

    record = register_batched()
    yield
    if record is not None:
        moe_core.unregister_plugin(record.name)


class GlooPool:
    """W processes in one gloo group, which run one task after another: starting them costs seconds, a task does not."""

    def __init__(self, world: int, folder: Path) -> None:
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(FOLDER / "gloo_worker.py"), str(rank), str(world), str(folder / "store")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for rank in range(world)
        ]

    def __call__(self, task: str, *arguments: Any) -> list[Any]:
        """`gloo_tasks.<task>(group, *arguments)` on every rank; the results, an exception's text in place of one."""
        for process in self.processes:
            assert process.stdin is not None
            pickle.dump((task, arguments), process.stdin)
            process.stdin.flush()
        return [pickle.load(process.stdout) for process in self.processes if process.stdout is not None]

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            process.wait(timeout=30)


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], GlooPool]]:
    """`gloo(W)`: the pool of W ranks, one per session."""
    pools: dict[int, GlooPool] = {}

    def pool(world: int) -> GlooPool:
        if world not in pools:
            pools[world] = GlooPool(world, tmp_path_factory.mktemp(f"gloo{world}"))
        return pools[world]

    yield pool
    for made in pools.values():
        made.close()
