"""What moe-mori declares, what it says where MoRI can't run, and that its calls bind to MoRI's signatures."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from typing import Any

import attrs
import pytest
import torch

from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.quant import UNQUANTIZED
from moe_core.testing import run_on_ranks
from moe_core.types import MODEL_DTYPE_PAYLOAD, Device, ExpertPlacement, Routing
from moe_mori import availability, emulation, limits

CONFIG = MoEConfig(
    num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048, max_tokens_per_rank=128, dtype=torch.bfloat16
)
OWN_TOKENS = MoEParallelConfig.fold(dp_size=4, expert_parallel=True)


def test_it_says_in_one_line_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert availability.probe().reason == (
        f"MoRI needs torch for ROCm and an AMD GPU, and torch {torch.__version__} is built for CUDA; the library "
        "(amd_mori) is not installed: pip install . in a checkout of github.com/ROCm/mori"
    )


def test_it_is_found_by_its_files(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mori").mkdir()
    (tmp_path / "mori" / "__init__.py").write_text("raise AssertionError('a probe imports no vendor library')")
    assert availability.probe().reason == (
        "mori is installed without its extension (libmori_pybinds.so): build it on a machine with ROCm"
    )
    (tmp_path / "mori" / "libmori_pybinds.so").touch()
    assert availability.probe().ok


@pytest.mark.parametrize(
    ("version", "parsed", "takes_dropped"),
    [
        ("1.2.2", (1, 2, 2), True),
        ("v1.2.1", (1, 2, 1), True),
        ("1.2.0.dev4+g1234", (1, 2, 0), False),
        ("0.1.0", (0, 1, 0), False),
        ("main", None, True),
    ],
)
def test_what_changed_with_versions_follows_from_the_installed_one(monkeypatch, version, parsed, takes_dropped):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert availability.installed_version() == parsed
    assert limits.skips_dropped_ids(parsed) is takes_dropped
    assert emulation.capabilities(parsed).accepts_dropped_ids is takes_dropped


def test_a_listing_imports_neither_the_library_nor_the_adapter():
    code = (
        "import sys, moe_mori.plugin as p; p.probe(); "
        "print([m for m in sys.modules if m.startswith(('mori', 'moe_mori.prepare', 'moe_mori._v'))])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_a_build_says_why_the_library_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "mori").mkdir()
    (tmp_path / "mori" / "__init__.py").write_text("")
    (tmp_path / "mori" / "ops.py").write_text("raise OSError('libamdhip64.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with pytest.raises(ImportError, match=r"^MoRI can't be imported: libamdhip64.so: cannot open shared object"):
            importlib.import_module("moe_mori._vendor_api")
    finally:
        sys.modules.pop("mori", None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": Device("cuda", (9, 0), "NVIDIA H200")}, "runs on AMD GPUs, not on NVIDIA H200"),
        ({"parallel": MoEParallelConfig(ep_size=4)}, "all 4 ranks have the same tokens"),
        ({"parallel": MoEParallelConfig.fold(dp_size=6, expert_parallel=True)}, "ep_size = 6: .* a power of two"),
        ({"max_tokens_per_rank": None}, r"max_tokens_per_rank = None: the receive buffers are .* · 4 rows"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(changes, said):
    own = {"parallel": OWN_TOKENS, "device": Device("cuda", (9, 4), "AMD Instinct MI300X")}
    own |= {k: v for k, v in changes.items() if k in own}
    config = attrs.evolve(CONFIG, **{k: v for k, v in changes.items() if k not in own})
    reason = limits.refuse(Problem(config=config, **own))
    assert reason is not None
    assert re.search(said, reason), reason
    assert limits.refuse(Problem(config=CONFIG, parallel=OWN_TOKENS)) is None


def test_bytes_of_a_step_follow_the_ranks_that_a_token_goes_to():
    problem = Problem(config=CONFIG, parallel=OWN_TOKENS)
    found = limits.footprint(problem, MODEL_DTYPE_PAYLOAD, 64)
    some = 1.0  # a token misses a rank's 64 experts of 256 if all its 8 choices are among the other 192
    for taken in range(8):
        some *= (192 - taken) / (256 - taken)
    rows = 3 * 64 * (1 - some)
    assert found.rows == 4 * 128
    assert found.combine_wire_bytes == round(rows * 7168 * 2)
    assert found.dispatch_wire_bytes == round(rows * (7168 * 2 + 8 * 8))


CONFIG_FIELDS = (
    "data_type rank world_size hidden_dim scale_dim scale_type_size max_token_type_size max_num_inp_token_per_rank "
    "num_experts_per_rank num_experts_per_token warp_num_per_block block_num use_external_inp_buf kernel_type "
    "gpu_per_node rdma_block_num num_qp_per_pe"
)
"""Of `mori.ops.EpDispatchCombineConfig` in every release, in their order; later ones have more."""


def old_dispatch(input, weights, scales, indices, block_num=-1, rdma_block_num=-1, warp_per_block=-1): ...


def new_dispatch(
    input, weights, scales, indices, block_num=-1, rdma_block_num=-1, warp_per_block=-1,
    call_local_expert_count=False, *, routing=None, return_routing=False,
): ...  # fmt: skip


def old_combine(
    input, weights, indices, block_num=-1, rdma_block_num=-1, warp_per_block=-1, use_external_inp_buf=-1,
    call_reset=False,
): ...  # fmt: skip


def new_combine(
    input, weights, indices, block_num=-1, rdma_block_num=-1, warp_per_block=-1, use_external_inp_buf=-1,
    call_reset=False, *, routing=None,
): ...  # fmt: skip


VENDOR = {
    (1, 2, 0): {"dispatch": old_dispatch, "combine": old_combine},
    (1, 2, 2): {"dispatch": new_dispatch, "combine": new_combine},
}
"""The calls of `mori.ops.EpDispatchCombineOp` as MoRI's sources declare them."""


@pytest.mark.parametrize("version", VENDOR, ids=str)
def test_the_adapters_calls_bind_to_moris_signatures(version, monkeypatch):
    """Every call that a build and a step make, with its arguments, is bound to what MoRI's sources declare."""
    calls: list[str] = []
    operator = emulation.Operator if limits.skips_dropped_ids(version) else emulation.OldOperator

    def watched(name: str) -> Any:
        original = getattr(operator, name)

        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            inspect.signature(VENDOR[version][name]).bind(*arguments, **options)
            calls.append(f"{name} {sorted(options)}")
            return original(self, *arguments, **options)

        call.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return call

    for name in ("dispatch", "combine"):
        monkeypatch.setattr(operator, name, watched(name))

    def work(group: Any) -> None:
        config = attrs.evolve(CONFIG, num_experts=4, top_k=2, hidden_size=8, max_tokens_per_rank=4)
        parallel = MoEParallelConfig.fold(dp_size=2, dp_rank=group.rank, expert_parallel=True)
        backend = emulation.make_emulated(config, parallel, UNQUANTIZED, group, ExpertPlacement.LINEAR, version=version)
        x, routing = torch.ones(2, 8).bfloat16(), Routing(torch.tensor([[0, 2], [1, 3]]), torch.ones(2, 2))
        d = backend.prepare(x, routing, num_experts=4, expert_map=None, payload=MODEL_DTYPE_PAYLOAD)
        backend.finalize(d.x, d.handle, routing, torch.empty_like(x))

    run_on_ranks(2, work)
    new = limits.skips_dropped_ids(version)
    asked = ("dispatch ['return_routing']", "combine ['routing']") if new else ("dispatch []", "combine []")
    assert set(calls) >= set(asked)


@pytest.mark.parametrize("config", [emulation.OldConfig, emulation.Config])
def test_the_emulations_configuration_has_moris_fields(config):
    found = [field.name for field in dataclasses.fields(config)]
    assert found[: len(CONFIG_FIELDS.split())] == CONFIG_FIELDS.split()


@pytest.mark.parametrize("name", ["dispatch", "combine"])
@pytest.mark.parametrize("version", VENDOR, ids=str)
def test_the_emulations_calls_have_moris_parameters(version, name):
    operator = emulation.Operator if limits.skips_dropped_ids(version) else emulation.OldOperator
    found = list(inspect.signature(getattr(operator, name)).parameters)
    assert found[1:] == list(inspect.signature(VENDOR[version][name]).parameters)
