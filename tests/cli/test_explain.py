"""`moe-core explain`: plans with reasons from a config alone."""

from __future__ import annotations

import json
import re
import shutil

import attrs
import pytest

from moe_core.cli.plan_text import ranges
from moe_core.interfaces import PrepareAndFinalize
from moe_core.plugins import PluginStatus, registry

ALL = ["Mixtral", "Qwen3-MoE", "DeepSeek-V3", "gpt-oss"]


@pytest.mark.parametrize("name", ALL)
def test_from_the_config_alone(name, checkpoints, tmp_path, invoke):
    alone = tmp_path / "some_config.json"
    shutil.copy(checkpoints(name) / "config.json", alone)
    result = invoke("explain", alone, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert ("layer 1 (" if name == "DeepSeek-V3" else "layers 0-1 (") in result.stdout
    assert "dispatch local · experts torch" in result.stdout
    assert "chosen     local + torch" in result.stdout
    assert invoke("explain", checkpoints(name), "--device", "cpu").stdout == result.stdout


def test_every_reason_stands_in_the_short_form_and_every_pair_in_the_whole(invoke):
    shape = ("explain", "E=64,K=8,H=2048,I=1024", "--device", "h200", "--world", "16", "--tokens", "8")
    short, whole = invoke(*shape).stdout, invoke(*shape, "--all").stdout
    candidates = json.loads(invoke(*shape, "--json").stdout)["groups"][0]["plan"]["candidates"]
    for item in candidates:
        pair = f"{item['dispatch']} + {item['experts']}  (priority"
        assert pair in whole
        assert pair not in short
        for reason in item["reasons"]:
            assert reason in whole
            assert reason.partition(": ")[2] in short
    assert f"each of the {len(candidates)} pairs with every reason: --all" in short
    once = "carries no tokens between ranks, and with dp_size = 16"
    assert (short.count(once), whole.count(once)) == (1, len({item["experts"] for item in candidates}))


def test_a_backend_that_serves_only_the_smaller_of_two_steps(invoke, monkeypatch):
    """Buffers are sized by the largest T, so there is one layer: it is refused, and has no costs at the smaller T."""
    gather = registry().dispatch["all_gather"]
    small = attrs.evolve(gather.capabilities, max_tokens_per_rank=64)
    monkeypatch.setitem(
        registry().dispatch, "acme_small", attrs.evolve(gather, name="acme_small", capabilities=small, priority=99)
    )
    shape = ("explain", "E=64,K=8,H=2048,I=1024", "--device", "cpu", "--world", "4", "--tokens", "64", "--tokens", "65")
    result = invoke(*shape)
    assert result.exit_code == 0, result.output
    assert "dispatch acme_small: max_tokens_per_rank = 65: must be set, to at most 64" in result.stdout
    assert "acme_small + torch" not in result.stdout
    assert re.search(r"all_gather \+ torch +chosen", result.stdout)


def test_costs_are_those_of_plan_for_the_same_buffers(invoke):
    """Also where T is far below what the buffers hold, and where a backend always moves them whole."""
    shape = ("E=16,K=4,H=64,I=32,dtype=float32", "--world", "4", "--device", "cpu", "--json")
    (group,) = json.loads(invoke("explain", *shape, "--tokens", "1", "--tokens", "4096").stdout)["groups"]
    for tokens in (1, 4096):
        asked = ("--tokens", str(tokens), "--max-tokens", "4096")
        (plan,) = json.loads(invoke("plan", *shape, *asked).stdout)["plans"]
        planned = {(pair["dispatch"], pair["experts"]): pair["cost"] for pair in plan["pairs"] if "cost" in pair}
        costs = [each for each in group["plan"]["costs"] if each["tokens"] == tokens]
        explained = {(each["dispatch"], each["experts"]): each for each in costs}
        assert set(explained) == set(planned) >= {("all_gather", "torch")}
        for pair, cost in planned.items():
            assert cost == {name: explained[pair][name] for name in cost}
        assert planned["all_gather", "torch"]["slots"] == 4 * 4096


class NoFinalize(PrepareAndFinalize):
    """Its author misspelt `finalize`."""

    def __init__(self, group):
        self.ranks = group.size

    def prepare(self, hidden_states, routing, **options): ...

    def finalise(self, expert_out, handle, routing, out): ...


BROKEN = {
    "its class lacks finalize": ("dispatch", lambda config, parallel, scheme, group, placement: NoFinalize(group)),
    "a dispatch's factory gives None": ("dispatch", lambda config, parallel, scheme, group, placement: None),
    "an experts' factory gives None": ("experts", lambda config, parallel, scheme, group, placement: None),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_chosen_pair_that_cannot_be_built_is_told_once_and_is_an_error(what, invoke, monkeypatch, tmp_path):
    kind, factory = BROKEN[what]
    backends = getattr(registry(), kind)
    like = backends[{"dispatch": "all_gather", "experts": "torch"}[kind]]
    acme = attrs.evolve(like, name="acme", plugin="acme 1.0", factory=factory, priority=99)
    monkeypatch.setitem(backends, "acme", acme)
    shape = ("E=16,K=4,H=64,I=32,dtype=float32", "--world", "4", "--device", "cpu", "--tokens", "8")
    pair = {"dispatch": "acme + torch", "experts": "all_gather + acme"}[kind]
    page = tmp_path / "page.html"
    for command in ("explain", "plan"):
        result = invoke(command, *shape)
        assert result.exit_code == 1
        assert f"selection takes {pair}, which can't be built" in result.stdout
        assert result.stdout.count(f"{kind} acme: not usable: its factory ") == 1
        assert result.stdout.count("(acme 1.0, moe_core_register_") == 1
        assert "chosen" not in result.stdout
    written = invoke("explain", *shape, "--html", page, "--json")
    assert written.exit_code == 1
    assert json.loads(written.stdout)["groups"][0]["plan"]["not_usable"] == [pair]
    assert "not usable: its factory" in page.read_text()


def test_a_pair_that_cannot_be_built_and_is_not_chosen_is_refused_and_no_error(invoke, monkeypatch):
    gather = registry().dispatch["all_gather"]
    acme = attrs.evolve(gather, name="acme", plugin="acme 1.0", factory=lambda *_: None, priority=-99)
    monkeypatch.setitem(registry().dispatch, "acme", acme)
    for command in ("explain", "plan"):
        result = invoke(command, "E=16,K=4,H=64,I=32,dtype=float32", "--world", "4", "--device", "cpu", "--tokens", "8")
        assert result.exit_code == 0, result.output
        assert result.stdout.count("dispatch acme: not usable: its factory returned None") == 1
        assert "chosen" in result.stdout


def test_a_factory_that_needs_ranks_or_a_device_is_not_blamed(invoke, monkeypatch):
    def meets_the_others(config, parallel, scheme, group, placement):
        group.barrier()

    gather = registry().dispatch["all_gather"]
    acme = attrs.evolve(gather, name="acme", plugin="acme 1.0", factory=meets_the_others, priority=99)
    monkeypatch.setitem(registry().dispatch, "acme", acme)
    result = invoke("explain", "E=16,K=4,H=64,I=32,dtype=float32", "--world", "4", "--device", "cpu", "--tokens", "8")
    assert result.exit_code == 0, result.output
    assert "chosen     acme + torch" in result.stdout


def test_a_footprint_that_breaks_its_contract_is_told_in_place_of_costs(invoke, monkeypatch, tmp_path):
    local = registry().dispatch["local"]
    broken = attrs.evolve(local.capabilities, footprint=lambda *_: 12)
    candidate = attrs.evolve(local, name="acme", plugin="acme 1.0", capabilities=broken, priority=99)
    monkeypatch.setitem(registry().dispatch, "acme", candidate)
    page = tmp_path / "page.html"
    arguments = ("explain", "E=64,K=8,H=2048,I=1024", "--device", "cpu", "--tokens", "4")
    says = "its footprint (acme 1.0) answered 12 at T = 4; expected a DispatchFootprint (docs/plan.md)"
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert f"no cost of acme + torch: dispatch acme: {says}" in result.stdout
    assert "local + torch" in result.stdout
    plan = json.loads(invoke(*arguments, "--json", "--html", page).stdout)["groups"][0]["plan"]
    assert f"acme + torch: dispatch acme: {says}" in plan["costs_missing"]
    assert says in plan["details_missing"][0]
    assert says in page.read_text()


def test_json(checkpoints, invoke):
    found = json.loads(invoke("explain", checkpoints("gpt-oss"), "--json", "--device", "cpu").stdout)
    (group,) = found["groups"]
    assert found["model_type"] == "gpt_oss"
    assert group["layers"] == [0, 1]
    assert group["plan"]["dispatch"]["name"] == "local"
    assert group["plan"]["candidates"]


def test_for_a_device_that_is_not_here(checkpoints, invoke):
    found = json.loads(invoke("explain", checkpoints("Mixtral"), "--json", "--device", "cuda:9.0").stdout)
    assert found["groups"][0]["plan"]["layer"]["device"] == "a CUDA device of compute capability 9.0"


def test_config_with_an_infinity_in_it(tmp_path, invoke):
    """transformers writes one as {"__float__": "Infinity"}, which plain JSON readers take for an object."""
    transformers = pytest.importorskip("transformers")
    layers = {"layers_block_type": ["attention", "moe"], "num_hidden_layers": 2, "vocab_size": 64, "hidden_size": 64}
    transformers.NemotronHConfig(**layers).save_pretrained(tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    result = invoke("explain", tmp_path, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "relu2" in result.stdout


def test_config_that_transformers_refuses(copied, refused):
    said = refused("explain", copied(hidden_size="many"))
    assert "config.json: transformers refuses it: " in said


def test_unknown_backend(checkpoints, refused):
    said = refused("explain", checkpoints("Mixtral"), "--experts", "nonsense")
    assert "unknown experts 'nonsense'; known here: " in said
    assert "torch, triton" in said
    assert "try pip install moe-" in said
    assert "unknown dispatch 'nonsense'" in refused("explain", checkpoints("Mixtral"), "--dispatch", "nonsense")


def test_unsupported_architectures(copied, refused, tmp_path):
    folder = copied(model_type="llama", architectures=["LlamaForCausalLM"])
    said = refused("explain", folder)
    assert said.startswith("LlamaForCausalLM")
    assert "mixtral" in said
    (folder / "config.json").write_text('{"model_type": "brand_new_moe"}')
    said = refused("explain", folder)
    assert "model_type 'brand_new_moe' is unknown to transformers" in said
    assert "qwen3_moe" in said


def test_no_config(tmp_path, refused):
    assert "no config.json" in refused("explain", tmp_path)
    assert "does not exist" in refused("explain", tmp_path / "nowhere")


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")])
def test_ranges(numbers, text):
    assert ranges(numbers) == text


def test_a_plugin_that_failed_is_named_in_the_last_line_and_one_that_is_disabled_is_not(invoke, monkeypatch):
    def record(name, status):
        return attrs.evolve(registry().plugins[0], name=name, status=status, reason="it is late")

    found = [*registry().plugins, record("ring", PluginStatus.FAILED), record("asleep", PluginStatus.DISABLED)]
    monkeypatch.setattr(registry(), "plugins", found)
    result = invoke("explain", "qwen3-30b", "--device", "cpu", "--tokens", "4")
    assert result.stdout.splitlines()[-1] == "not loaded: plugin ring (failed; see moe-core plugins)"
    assert "asleep" not in result.stdout


def test_a_shape_that_is_not_known_is_told_with_those_that_are(refused):
    said = refused("explain", "qwen3-30")
    assert "'qwen3-30' is no folder here and no shape; did you mean 'qwen3-30b'?" in said
    assert "shapes by name: " in said
    assert "did you mean" not in refused("plan", "zzzzz")


def test_a_backend_that_is_insisted_on_is_refused_with_each_reason_once(refused):
    shape = ("explain", "E=16,K=4,H=64,I=32,dtype=float32", "--world", "4", "--device", "cpu", "--tokens", "8")
    said = refused(*shape, "--dispatch", "local")
    assert "as asked (dispatch 'local')" in said
    assert said.count("carries no tokens between ranks") == 1
    said = refused(*shape, "--spread", "tp", "--dispatch", "mori")
    assert said.count("needs 2 to 8 expert-parallel ranks; here ep = 1 (tp = 4)") == 1
