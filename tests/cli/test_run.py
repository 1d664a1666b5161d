"""`moe-core run`: real checkpoints generate the same tokens as with transformers' own experts."""

from __future__ import annotations

import json
import re

import pytest
import torch

from moe_core.plugins import registry

ALL = ["Mixtral", "Qwen3-MoE", "DeepSeek-V3", "gpt-oss"]


def run(invoke, *arguments):
    result = invoke("run", *arguments, "--json", "--max-new-tokens", 5, "--device", "cpu")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ALL)
def test_same_tokens_as_transformers(name, checkpoints, invoke):
    found = run(invoke, checkpoints(name), "--compare")
    assert found["dtype"] == "float32"
    assert len(found["tokens"]) == 5
    assert found["compare"]["tokens_equal"]
    assert found["compare"]["logit_difference"] < 1e-4
    assert found["compare"]["theirs"] != "moe_core"
    assert found["groups"][0]["plan"]["candidates"]
    assert found["ms_per_token"] > 0
    assert found["peak_memory_bytes"] > 2**20


def test_text_and_streams(checkpoints, invoke):
    result = invoke("run", checkpoints("Mixtral"), "--compare", "--prompt-ids", "5, 6 7", "--device", "cpu")
    assert result.exit_code == 0
    for expected in ("layers 0-1 (", "chosen     local + torch", "prompt       5 6 7", "tokens equal              yes"):
        assert expected in result.stdout
    assert re.search(r"mixtral, \d+ tensors in \d+ files", result.stderr)
    assert "loading the weights" in result.stderr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype, checkpoints, invoke):
    found = run(invoke, checkpoints("Mixtral"), "--dtype", dtype)
    assert found["dtype"] == dtype
    assert found["groups"][0]["plan"]["layer"]["dtype"] == dtype


def test_backends_can_be_insisted_on(checkpoints, invoke, refused):
    if "batched" in registry().dispatch:
        found = run(invoke, checkpoints("Mixtral"), "--dispatch", "batched", "--compare")
        assert found["groups"][0]["plan"]["dispatch"]["name"] == "batched"
        assert found["compare"]["tokens_equal"]
    said = refused("run", checkpoints("Mixtral"), "--dispatch", "nonsense")
    assert "unknown dispatch 'nonsense'; known here: " in said
    assert "unknown experts 'nonsense'" in refused("run", checkpoints("Mixtral"), "--experts", "nonsense")


def test_debug_mode_runs_the_same(checkpoints, invoke):
    arguments = ["run", str(checkpoints("Mixtral")), "--prompt-ids", "3,4,5", "--max-new-tokens", "3", "--json"]
    plain, checked = (json.loads(invoke(*arguments, *more).stdout) for more in ((), ("--debug",)))
    assert plain["tokens"] == checked["tokens"]


def test_sampling_settings_of_the_folder_do_not_matter(copied, checkpoints, invoke):
    folder = copied()
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 9.0, "top_k": 3}))
    assert run(invoke, folder)["tokens"] == run(invoke, checkpoints("Qwen3-MoE"))["tokens"]


def test_end_of_text_ends_it(copied, checkpoints, invoke):
    first = run(invoke, checkpoints("Qwen3-MoE"))["tokens"]
    folder = copied()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": first[1]}))
    found = run(invoke, folder, "--compare")
    assert found["tokens"] == first[:2]
    assert found["compare"]["tokens_equal"]


def test_tokenizer(copied, invoke, refused):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = copied()
    assert "has no tokenizer that can be used; pass --prompt-ids 1,2,3" in refused("run", folder, "--prompt", "one two")
    vocabulary = {f"w{index}": index for index in range(128)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    found = run(invoke, folder, "--prompt", "w5 w6 w7")
    assert found["prompt_ids"] == [5, 6, 7]
    assert found["text"] == " ".join(f"w{token}" for token in found["tokens"])


def test_bad_prompts(checkpoints, refused):
    folder = checkpoints("Mixtral")
    assert "--prompt-ids '1,x': expected numbers from 0 to 127" in refused("run", folder, "--prompt-ids", "1,x")
    assert "expected numbers from 0 to 127" in refused("run", folder, "--prompt-ids", "1,128")
    assert "expected numbers from 0 to 127" in refused("run", folder, "--prompt-ids", "")
    assert "both given" in refused("run", folder, "--prompt-ids", "1", "--prompt", "one")


def test_bad_device(checkpoints, refused):
    assert "--device 'nonsense'" in refused("run", checkpoints("Mixtral"), "--device", "nonsense")
    if not torch.cuda.is_available():
        assert "torch sees no CUDA device here" in refused("run", checkpoints("Mixtral"), "--device", "cuda")


def test_nothing_asks_the_network(checkpoints, process, tmp_path):
    """Any connection at all would leave a trace; HF_HUB_OFFLINE of the test session is taken away."""
    trace = tmp_path / "trace"
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, socket\n"
        f"pathlib.Path({str(tmp_path / 'active')!r}).touch()\n"
        "def refuse(*address):\n"
        f"    pathlib.Path({str(trace)!r}).write_text(repr(address))\n"
        "    raise OSError('no network here')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )
    done = process(
        "run", checkpoints("Mixtral"), "--max-new-tokens", 2, "--device", "cpu", path=tmp_path, HF_HUB_OFFLINE="0"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "active").exists()
    assert not trace.exists(), trace.read_text()
