"""Small checkpoints, written the way the demo writes its own, and a way to call commands in this process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest

pytest.importorskip("transformers")

from click.testing import CliRunner, Result

from moe_core.cli.app import app
from moe_core.cli.demo_models import MODELS, DemoModel, write
from moe_core.plugins import registry

SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"DeepSeek-V3": {"num_key_value_heads": 4, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}}
OTHERS = {"num_key_value_heads": 2, "head_dim": 16}
INNER = {
    "Mixtral": {"intermediate_size": 32},
    "Qwen3-MoE": {"moe_intermediate_size": 32, "intermediate_size": 64},
    "DeepSeek-V3": {"moe_intermediate_size": 32, "intermediate_size": 64},
    "gpt-oss": {"intermediate_size": 32},
}


def small(model: DemoModel) -> DemoModel:
    family = model.name.partition(",")[0]
    settings = model.settings | SMALL | HEADS.get(family, OTHERS) | INNER[family]
    return attrs.evolve(model, settings=settings, max_shard_size="100KB" if model.name == "Mixtral" else "1GB")


SMALL_MODELS = {model.name: small(model) for model in MODELS}


@pytest.fixture(scope="session")
def small_models() -> dict[str, DemoModel]:
    return SMALL_MODELS


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoints("Mixtral")`: a folder, written once; no test may change it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("checkpoints") / name.lower()
            write(SMALL_MODELS[name], made[name])
        return made[name]

    return folder


@pytest.fixture
def copied(checkpoints: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """The same as a copy that a test may damage; keyword arguments go into its config.json."""

    def copy(name: str = "Qwen3-MoE", **config: Any) -> Path:
        target = shutil.copytree(checkpoints(name), tmp_path / "checkpoint")
        file = target / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return target

    return copy


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """`invoke("run", folder, …)`: a command, in this process."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def no_plugin_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no package that reads packed checkpoints were installed."""
    entries = {name: entry for name, entry in registry().quant_methods.items() if entry.from_checkpoint_config is None}
    monkeypatch.setattr(registry(), "quant_methods", entries)


@pytest.fixture
def refused(invoke: Callable[..., Result]) -> Callable[..., str]:
    """`refused("run", folder)`: calls it, checks that it fails as it should, and returns what it says.

    One message on stderr, exit code 1, nothing on stdout, and every file named in the arguments untouched.
    """

    def call(*arguments: Any) -> str:
        folders = [argument for argument in arguments if isinstance(argument, Path) and argument.is_dir()]
        before = [contents(folder) for folder in folders]
        result = invoke(*arguments)
        assert [contents(folder) for folder in folders] == before
        assert (result.exit_code, result.stdout) == (1, ""), result.output
        assert "Traceback" not in result.stderr
        return result.stderr.partition("Error: ")[2]

    return call


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`process("plugins", path=folder)`: a command in a process of its own, with `path` before everything else."""

    def call(*arguments: Any, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        search = os.pathsep.join(filter(None, [str(path or ""), os.environ.get("PYTHONPATH", "")]))
        return subprocess.run(
            [sys.executable, "-m", "moe_core", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": search} | environment,
            capture_output=True,
            text=True,
            timeout=100,
        )

    return call


@pytest.fixture
def installed(tmp_path: Path) -> Callable[..., Path]:
    """`installed("acme", source)`: a folder that holds a distribution with a plugin, as pip would leave it."""

    def install(name: str, source: str, **files: str) -> Path:
        site = tmp_path / "site"
        package, metadata = site / f"moe_{name}", site / f"moe_{name}-1.2.dist-info"
        package.mkdir(parents=True)
        metadata.mkdir()
        (package / "__init__.py").write_text("")
        (package / "plugin.py").write_text(source)
        for file, content in files.items():
            (package / f"{file}.py").write_text(content)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: moe-{name}\nVersion: 1.2\n")
        (metadata / "entry_points.txt").write_text(f"[moe_core.plugins]\n{name} = moe_{name}.plugin\n")
        return site

    return install
