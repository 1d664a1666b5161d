"""What the README shows is run: its Python blocks, and its file map against the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_library_lines_run(capsys):
    (block,) = [block for block in python_blocks() if "build_runner" in block]
    assert len([line for line in block.splitlines() if line and not line.startswith("import")]) <= 10
    scope: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert tuple(scope["out"].shape) == (5, 512)
    assert scope["out"].isfinite().all()
    printed = capsys.readouterr().out
    assert "chosen     local + torch" in printed
    assert "dispatch:local" in printed


def test_the_transformers_lines_run(tmp_path):
    transformers = pytest.importorskip("transformers")
    (block,) = [block for block in python_blocks() if "from_pretrained" in block]
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    scope: dict[str, object] = {"folder": str(tmp_path)}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["model"].config._experts_implementation == "moe_core"


def test_every_file_of_the_core_stands_in_the_map_and_every_entry_exists():
    section = README.split("<!-- files:begin -->")[1].split("<!-- files:end -->")[0]
    listed = set(re.findall(r"^\| `([^`]+)`", section, re.MULTILINE))
    core = ROOT / "moe_core"
    there = {path.name for path in core.glob("*.py")} | {
        f"{path.name}/" for path in core.iterdir() if path.is_dir() and not path.name.startswith("__")
    }
    assert listed == there - {"__init__.py", "__main__.py"}


def test_every_environment_variable_is_documented():
    used = {
        name
        for path in [*(ROOT / "moe_core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
        for name in re.findall(r"\bMOE_CORE_[A-Z_]+", path.read_text())
        if "/tests/" not in str(path)
    }
    assert used == set(re.findall(r"\bMOE_CORE_[A-Z_]+", README))
