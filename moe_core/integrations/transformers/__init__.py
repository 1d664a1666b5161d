"""The transformers bridge: importing it makes `experts_implementation="moe_core"` a legal choice.

    import moe_core.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(id, experts_implementation="moe_core")

That is all that is needed: each experts module is planned at its first call, for its own flags, dtype and device.
`attach(model)` does the same to a model that is loaded already, eagerly, and says how each layer will run;
`layer_plans(config)` says it without weights. Nothing is copied: experts read the module's own parameters.

| file | holds |
|---|---|
| `attach.py` | `attach`, `layer_plans`: whole models |
| `architectures.py` | what the installed transformers can hand over, and what it can't |
| `layer.py` | the function that transformers calls, its state, the opaque op |
| `plans.py` | a module → a `Plan` |
| `gates.py` | which activation a module computes |
| `foreign.py` | flags, parameters and views of a module |
| `quantized.py` | what becomes of a quantized checkpoint on the way here |
| `packed.py` | `from_pretrained`: quantized checkpoints with experts kept packed |
| `unfused.py` | experts that call a module's own gate or norm |
"""

try:
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    from transformers.integrations.moe import ExpertsInterface
except ImportError as error:
    raise ImportError(
        f"moe_core.integrations.transformers needs transformers 5.17 or newer ({error}); pip install 'moe-core[hf]'"
    ) from error

from moe_core.integrations.transformers import packed
from moe_core.integrations.transformers.architectures import supported_architectures
from moe_core.integrations.transformers.attach import IMPLEMENTATION, attach, layer_plans
from moe_core.integrations.transformers.foreign import experts_modules
from moe_core.integrations.transformers.layer import experts_forward, layer_for, packed_experts_forward
from moe_core.integrations.transformers.plans import BridgePlan

__all__ = [
    "IMPLEMENTATION",
    "BridgePlan",
    "attach",
    "experts_modules",
    "layer_for",
    "layer_plans",
    "packed",
    "supported_architectures",
]

# Two registries: the check of the name joins them, the call does not. A name in one only is a KeyError on the other's.
ExpertsInterface.register(IMPLEMENTATION, experts_forward)
FP8ExpertsInterface.register(IMPLEMENTATION, packed_experts_forward)
