"""Makes the stand-in importable, and registers the plugins where the tests run from a checkout alone."""

import sys
from pathlib import Path

import pytest

import moe_core
from moe_core.plugins import registry

PLUGINS = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(PLUGINS / "experts_deepgemm"), str(PLUGINS / "moe_batched")]


@pytest.fixture(autouse=True)
def _registered():
    """This plugin, and the dispatch that delivers the batched format."""
    import experts_deepgemm.plugin
    import moe_batched.plugin

    made = []
    for name, kind, plugin in (("deepgemm", "experts", experts_deepgemm.plugin),
                               ("batched", "dispatch", moe_batched.plugin)):  # fmt: skip
        if name not in getattr(registry(), kind):
            made.append(moe_core.register_plugin(plugin))
    yield
    for record in made:
        moe_core.unregister_plugin(record.name)
