"""`import moe_core` is cheap: no plugin, no triton, no transformers, and little time beside torch's own."""

from __future__ import annotations

import statistics
import sys

ROUNDS = 5
LIMIT = 1.2

# CPU seconds, not wall seconds: they are the same for an import on an idle machine, and test workers share the cores.
TIMED_IMPORT = "import time; start = time.process_time(); import {module}; print(time.process_time() - start)"


def test_import_takes_little_more_than_torch(run):
    seconds: dict[str, list[float]] = {"torch": [], "moe_core": []}
    for module in seconds:  # once unmeasured: bytecode and disk cache
        run(sys.executable, "-c", TIMED_IMPORT.format(module=module))
    for _ in range(ROUNDS):  # interleaved, so that a slower machine half-way slows both
        for module, measured in seconds.items():
            measured.append(float(run(sys.executable, "-c", TIMED_IMPORT.format(module=module))))
    torch_s, ours_s = (statistics.median(seconds[module]) for module in ("torch", "moe_core"))
    assert ours_s < LIMIT * torch_s, f"import moe_core {ours_s:.2f} s, import torch {torch_s:.2f} s; {seconds}"


def test_import_loads_no_plugin_and_nothing_heavy(run, plugins):
    loaded = run(sys.executable, "-c", "import sys, moe_core; print(*{name.split('.')[0] for name in sys.modules})")
    unwanted = {"triton", "transformers", "safetensors", "click", "rich", *(plugin.package for plugin in plugins)}
    assert not unwanted & set(loaded.split())


def test_import_loads_no_built_in_backend(run):
    loaded = run(sys.executable, "-c", "import sys, moe_core; print(*sys.modules)").split()
    assert not [name for name in loaded if name.startswith(("moe_core.builtin", "moe_core.ops"))]


def test_plugin_module_only_declares(plugin, run):
    """`plugin.py` is read at every listing: it imports neither triton nor its vendor library, and stays short."""
    vendors = {"triton", "transformers", "mori", "nixl_ep", "deep_ep", "deep_gemm", "vllm", "sglang"}
    for module in plugin.entry_points.values():
        loaded = run(sys.executable, "-c", f"import sys, {module}; print(*{{n.split('.')[0] for n in sys.modules}})")
        assert not vendors & set(loaded.split())
        lines = (plugin.folder / module.replace(".", "/")).with_suffix(".py").read_text().splitlines()
        assert len(lines) <= 60, f"{module} has {len(lines)} lines; declarations fit in 60"
