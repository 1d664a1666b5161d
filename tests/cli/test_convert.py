"""`moe-core convert`: what it writes runs, and transformers reads the same values from it."""

from __future__ import annotations

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "DeepSeek-V3"])
@pytest.mark.parametrize(("form", "scheme"), [("fp8-block", "fp8_weight_only"), ("nvfp4", "nvfp4")])
def test_a_converted_checkpoint_runs_packed(form, scheme, name, checkpoints, invoke, tmp_path):
    folder = tmp_path / "packed"
    result = invoke("convert", checkpoints(name), folder, "--to", form)
    assert result.exit_code == 0, result.output
    assert "experts packed" in result.stdout
    ran = invoke(
        "run",
        folder,
        "--scheme",
        scheme,
        "--dtype",
        "float32",
        "--prompt-ids",
        "3,4,5",
        "--max-new-tokens",
        "3",
        "--json",
    )
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert {group["plan"]["layer"]["scheme"] for group in found["groups"]} == {scheme}
    assert len(found["tokens"]) == 3


def test_transformers_dequantizes_to_the_same_values(small_models, invoke, tmp_path):
    """Only where every projection is whole blocks: it takes the block size from the grid."""
    from moe_core.cli.demo_models import write
    from moe_core.integrations.transformers import packed

    settings = {"hidden_size": 128, "moe_intermediate_size": 128}
    write(small_models["Qwen3-MoE"], tmp_path / "plain", settings)
    folder = tmp_path / "packed"
    assert invoke("convert", tmp_path / "plain", folder, "--to", "fp8-block").exit_code == 0
    ours = packed.from_pretrained(folder, scheme="fp8_weight_only", dtype=torch.float32).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        got, expected = ours(ids).logits, theirs(ids).logits.float()
    assert float((got - expected).norm() / expected.norm()) < 0.01  # its dequantized experts are bf16


def test_refusals_are_one_message(checkpoints, refused, tmp_path):
    assert "holds several experts" in refused("convert", checkpoints("gpt-oss"), tmp_path / "new", "--to", "nvfp4")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    assert "exists already" in refused("convert", checkpoints("Mixtral"), tmp_path / "full", "--to", "nvfp4")
