"""Folders that are whole are opened by their headers; each kind of damage is named, with what to do."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_core import CheckpointError
from moe_core.checkpoint import Checkpoint

INDEX = "model.safetensors.index.json"


def first_shard(folder):
    """The first one with more than one tensor."""
    return next(file for file in sorted(folder.glob("model-*.safetensors")) if len(load_file(file)) > 1)


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_names_shapes_and_tensors(sharded, checkpoints):
    folder = checkpoints("mixtral", sharded)
    stored = {}
    for file in folder.glob("*.safetensors"):
        stored |= load_file(file)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.model_type == "mixtral"
        assert checkpoint.names == sorted(stored)
        assert checkpoint.num_bytes == sum(tensor.numel() * 4 for tensor in stored.values())
        for name, tensor in stored.items():
            assert (checkpoint.shape(name), checkpoint.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
            assert torch.equal(checkpoint.tensor(name), tensor)
            assert torch.equal(checkpoint.slice(name)[1], tensor[1])


def test_opening_reads_no_weights(copied, monkeypatch):
    folder = copied("mixtral", sharded=True)
    monkeypatch.setattr("safetensors.safe_open", None)
    assert len(Checkpoint.open(folder)) > 0


def test_unknown_tensor(checkpoints):
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.nothing' among its"):
        Checkpoint.open(checkpoints("mixtral")).tensor("model.nothing")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
def test_dtypes(dtype, copied):
    folder = copied("mixtral")
    save_file({"packed": torch.zeros(3, 4).to(dtype)}, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert (checkpoint.dtype("packed"), checkpoint.shape("packed")) == (dtype, (3, 4))


def remove(pattern):
    def change(folder):
        for file in folder.glob(pattern):
            file.unlink()

    return change


def truncate_shard(folder):
    file = first_shard(folder)
    file.write_bytes(file.read_bytes()[:-100])


def truncate_header(folder):
    file = first_shard(folder)
    file.write_bytes(file.read_bytes()[:50])


def lengthen_shard(folder):
    with first_shard(folder).open("ab") as stream:
        stream.write(b"\0" * 7)


def empty_shard(folder):
    first_shard(folder).write_bytes(b"")


def no_safetensors(folder):
    first_shard(folder).write_bytes(b"PK\x03\x04 something else, long enough to hold a length")


def lfs_pointer(folder):
    first_shard(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def damaged_header(folder):
    file = first_shard(folder)
    file.write_bytes(struct.pack("<Q", 8) + b"{broken}")


def absent_from_shard(folder):
    file = first_shard(folder)
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)


def absent_from_index(folder):
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(min(load_file(first_shard(folder)))))


def pickles_only(folder):
    remove("*.safetensors*")(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")


def config_is(text):
    return lambda folder: (folder / "config.json").write_text(text)


def index_leaves_the_folder(folder):
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"far": "../elsewhere.safetensors"}))


DAMAGE = {
    "no config": (
        remove("config.json"),
        r"no config\.json, so this is not a Hugging Face checkpoint folder; pass the one",
    ),
    "config cut short": (config_is("{"), r"config\.json: is not valid JSON \(.*line 1 column 2"),
    "config a list": (config_is("[]"), r"config\.json: holds a JSON list, expected an object"),
    "shard missing": (remove("model-00001*"), r"shard SHARD is missing, and \d+ tensors with it; fetch it"),
    "shard cut short": (truncate_shard, r"SHARD: truncated: \d+ bytes, its header announces \d+; 1 of \d+ tensors"),
    "header cut short": (truncate_header, r"SHARD: truncated inside its header: 50 bytes"),
    "shard too long": (lengthen_shard, r"SHARD: \d+ bytes, but its header announces \d+: it is damaged"),
    "shard empty": (empty_shard, r"SHARD: truncated: 0 bytes, too short for a header"),
    "other bytes": (no_safetensors, r"SHARD: is not a safetensors file"),
    "git-lfs pointer": (lfs_pointer, r"SHARD: is a git-lfs pointer.*run git lfs pull"),
    "header damaged": (damaged_header, r"SHARD: its header is damaged"),
    "tensor not in its shard": (
        absent_from_shard,
        r"SHARD: does not hold tensor '.*', which model.*index\.json places",
    ),
    "tensor not in the index": (
        absent_from_index,
        r"SHARD: holds tensor '.*', which model.*index\.json places in no file",
    ),
    "pickles only": (pickles_only, r"only pytorch_model\.bin\. Weights are read from safetensors only"),
    "no weights": (remove("*.safetensors*"), r"neither model\.safetensors nor .*index\.json: the weights are missing"),
    "no index": (remove(INDEX), r"neither model\.safetensors nor .*, but model-00001.*without the index nobody knows"),
    "index without a map": (lambda folder: (folder / INDEX).write_text("{}"), r"index\.json: has no weight_map"),
    "index out of the folder": (
        index_leaves_the_folder,
        r"names the shard '\.\./elsewhere.*expected a plain file name",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name, copied):
    damage, message = DAMAGE[name]
    folder = copied("mixtral", sharded=True)
    damage(folder)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(CheckpointError, match=message.replace("SHARD", r"model-\d+-of-\d+\.safetensors")):
        Checkpoint.open(folder)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_no_folder(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"nowhere: does not exist; expected a checkpoint folder.*Nothing is ever"
    ):
        Checkpoint.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: is a file; expected a checkpoint folder"):
        Checkpoint.open(tmp_path / "file")
