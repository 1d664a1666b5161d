"""The demo's checkpoints: real architectures, small, with random weights of a scale at which logits mean something.

Shape letters: E experts · H hidden · I intermediate.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch

from moe_core import formats
from moe_core.checkpoint import Checkpoint, Conversion, Form
from moe_core.checkpoint.reader import CONFIG_FILE, WEIGHTS_FILE

_COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # so that every side generates as many tokens as asked for
}
_MLA = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}


@attrs.frozen
class DemoModel:
    """One checkpoint of the demo.

    Attributes:
        name: for people.
        config_class: of transformers.
        shows: what is special about it.
        settings: over the common ones.
        max_shard_size: as in `save_pretrained`.
        packed: the format that its experts are converted to, as `moe-core convert --to` has it; "": none.
        scheme: what its packed experts run in.
    """

    name: str
    config_class: str
    shows: str
    settings: dict[str, Any]
    max_shard_size: str = "5GB"
    packed: str = ""
    scheme: str | None = None


_MIXTRAL = {"intermediate_size": 256, "num_local_experts": 8, "num_experts_per_tok": 2}
_QWEN3 = {
    "head_dim": 32,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}

MODELS = (
    DemoModel("Mixtral", "MixtralConfig", "softmax top-2, w1/w3/w2, sharded", _MIXTRAL, max_shard_size="8MB"),
    DemoModel("Qwen3-MoE", "Qwen3MoeConfig", "softmax top-4 of 16", _QWEN3),
    DemoModel(
        "DeepSeek-V3",
        "DeepseekV3Config",
        "grouped sigmoid routing with bias, shared expert",
        {
            "num_key_value_heads": 8,
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            **_MLA,
        },
    ),
    DemoModel(
        "gpt-oss",
        "GptOssConfig",
        "biases, clamped SwiGLU, interleaved, transposed",
        {
            "head_dim": 32,
            "intermediate_size": 256,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 131072,  # what its default rope settings go with
        },
    ),
    DemoModel(
        "Mixtral, fp8", "MixtralConfig", "experts packed in DeepSeek's fp8 blocks", _MIXTRAL,
        packed="fp8-block", scheme="fp8_weight_only",
    ),
    DemoModel(
        "Qwen3-MoE, nvfp4", "Qwen3MoeConfig", "experts packed in 4 bits", _QWEN3, packed="nvfp4", scheme="nvfp4"
    ),
)  # fmt: skip


def write(model: DemoModel, folder: Path, settings: dict[str, Any] | None = None) -> None:
    """Write a checkpoint with transformers' own `save_pretrained`.

    Args:
        model: which one.
        folder: where to.
        settings: over the model's own, for tests that want it smaller.
    """
    import transformers  # noqa: PLC0415 - an extra

    values = {**_COMMON, **model.settings, **(settings or {})}
    if model.config_class == "GptOssConfig":
        kinds = ("sliding_attention", "full_attention")
        values["layer_types"] = [kinds[layer % 2] for layer in range(values["num_hidden_layers"])]
    config = getattr(transformers, model.config_class)(**values)
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    scale_weights(made)
    made.save_pretrained(folder, max_shard_size=model.max_shard_size)


def write_packed(source: Path, folder: Path, values: Path, form: Form) -> None:
    """Convert a checkpoint, and write beside it what its bytes stand for, which transformers can run.

    Args:
        source: floating point, as `write` makes it.
        folder: where the packed one goes.
        values: where the same values go, in fp32.
        form: the format.
    """
    from safetensors.torch import save_file  # noqa: PLC0415 - an extra

    with Checkpoint.open(source) as plain:
        Conversion(plain, form).write(folder)
        with Checkpoint.open(folder) as packed:
            tensors = {name: _value(packed, name, form) for name in plain.names}
    values.mkdir()
    save_file(tensors, values / WEIGHTS_FILE, metadata={"format": "pt"})
    shutil.copyfile(source / CONFIG_FILE, values / CONFIG_FILE)


def _value(packed: Checkpoint, name: str, form: Form) -> torch.Tensor:
    """A tensor of the source as the packed checkpoint holds it."""
    held = {kind: packed.tensor(form.name(name, kind)) for kind in form.suffixes if form.name(name, kind) in packed}
    if "_scale" not in held:
        return packed.tensor(name)
    inverse = held.get("_inverse_global_scale")
    top = None if inverse is None else 1 / inverse.to(torch.float64).reshape(())
    return formats.dequantize(held[""], held["_scale"], form.spec, top)


def scale_weights(model: Any, seed: int = 0) -> None:
    """Random weights that keep the scale of the activations from layer to layer, so that no logit drowns in another.

    Every matrix is drawn with standard deviation 1/sqrt(inputs); norms are 1, biases small.
    """
    generator = torch.Generator().manual_seed(seed)
    transposed = {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if getattr(module, "is_transposed", False)
        for parameter in ("gate_up_proj", "down_proj")
    }
    draw: Callable[[torch.Tensor, float], Any] = lambda tensor, std: tensor.normal_(0, std, generator=generator)  # noqa: E731
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name:
                draw(parameter, 1.0)
            elif "norm" in name:
                parameter.fill_(1.0)
            elif "bias" in name or "sinks" in name:
                draw(parameter, 0.1)
            else:
                inputs = parameter.shape[-2 if name in transposed else -1]
                draw(parameter, inputs**-0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                draw(buffer, 0.05)
