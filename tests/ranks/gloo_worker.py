"""One rank of a `GlooPool`: reads tasks from stdin, writes their results to stdout, until stdin ends."""

from __future__ import annotations

import os
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import gloo_tasks
from rank_cases import register_batched

from moe_core.group import TorchGroup


def main() -> None:
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)  # several ranks share a machine
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    register_batched()
    group = TorchGroup(timeout_s=20)
    while True:
        try:
            task, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            break
        try:
            answer = getattr(gloo_tasks, task)(group, *arguments)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()
    os._exit(0)  # gloo's threads and the interpreter's exit race now and then, and that is not what is tested


if __name__ == "__main__":
    main()
