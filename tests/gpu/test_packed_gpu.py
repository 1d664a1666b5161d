"""ModelOpt's checkpoints as transformers models on a GPU, experts packed there, beside the same on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

packed = pytest.importorskip("moe_core.integrations.transformers.packed")
pytest.importorskip("accelerate", reason="transformers' device_map asks for it")

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = [
    ("fp8_qwen3_moe", "fp8_weight_only"),
    ("fp8_qwen3_moe", "fp8_tensor"),
    ("nvfp4_mixtral", "nvfp4"),
    ("nvfp4_gpt_oss", "nvfp4"),
]


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_a_packed_model_loads_onto_the_device(name, scheme):
    ids = torch.arange(3, 23)[None]
    before = torch.cuda.memory_allocated()
    model = packed.from_pretrained(FIXTURES / name, scheme=scheme, dtype=torch.bfloat16, device_map="cuda").eval()
    experts = [module for path, module in model.named_modules() if path.endswith("experts.packed")]
    assert experts
    for module in experts:
        assert {tensor.device.type for tensor in module.parameters()} == {"cuda"}
        assert module.w13.element_size() == 1
    assert torch.cuda.memory_allocated() > before
    truth = packed.from_pretrained(FIXTURES / name, scheme=scheme, dtype=torch.float32).eval()
    with torch.no_grad():
        got, expected = model(ids.cuda()).logits.float().cpu(), truth(ids).logits
    assert float((got - expected).norm() / expected.norm()) <= 0.03  # bf16 beside fp32
    tokens = model.generate(ids.cuda(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert tokens.shape == (1, 24)
