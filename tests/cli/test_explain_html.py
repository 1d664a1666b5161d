"""`moe-core explain` on other machines and for several ranks and schemes; and its page, in a real browser too."""

from __future__ import annotations

import html
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import attrs
import pytest

from moe_core.plugins import registry

SHAPE = "E=64,K=8,H=2048,I=1024"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags are closed, and keeps what a reader or a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def explained(invoke):
    """`explained(SHAPE, "--world", "8")`: what --json says."""

    def call(*arguments):
        result = invoke("explain", *arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return call


@pytest.fixture
def written(invoke, tmp_path):
    """`written(SHAPE, …)`: the page, as a file."""

    def call(*arguments) -> Path:
        file = tmp_path / "explained.html"
        result = invoke("explain", *arguments, "--html", file)
        assert result.exit_code == 0, result.output
        assert result.stdout == ""
        return file

    return call


def test_for_another_machine_and_several_ranks(explained):
    found = explained(SHAPE, "--device", "h200", "--world", "16", "--tokens", "32")
    (group,) = found["groups"]
    plan = group["plan"]
    assert (found["ranks"], plan["layer"]["device"], plan["layer"]["ep_size"]) == (16, "NVIDIA H200", 16)
    verdicts = {(item["dispatch"], item["experts"]): item for item in plan["candidates"]}
    assert verdicts["all_gather", "triton"]["verdict"] == "chosen"
    assert verdicts["all_gather", "torch"]["verdict"] == "outranked"
    assert "carries no tokens between ranks" in verdicts["local", "triton"]["reasons"][0]
    costs = {(item["dispatch"], item["experts"]): item for item in plan["costs"]}
    assert ("local", "triton") not in costs
    assert costs["all_gather", "triton"]["footprint"]["combine_wire_bytes"] == 15 * 32 * 2048 * 2
    assert costs["all_gather", "triton"]["seconds"]["wire"] > 0


def test_of_a_model_on_several_ranks(checkpoints, explained, invoke):
    arguments = (checkpoints("DeepSeek-V3"), "--device", "cpu", "--world", "2", "--tokens", "4")
    (group,) = explained(*arguments)["groups"]
    assert group["layers"] == [1]
    assert group["plan"]["dispatch"]["name"] == "all_gather"
    text = invoke("explain", *arguments).stdout
    assert "1 MoE layer on 2 ranks, experts shared out, each rank with tokens of its own" in text
    assert "wire at T = 4" in text
    assert re.search(r"all_gather \+ torch +chosen", text)


def test_every_scheme(explained, invoke):
    schemes = list(registry().quant_methods)
    (group,) = explained(SHAPE, "--device", "h200", "--scheme", "all", "--tokens", "8")["groups"]
    assert [table.get("scheme") or table["layer"]["scheme"] for table in group["schemes"]] == schemes
    for table in group["schemes"]:
        pairs = {(item["dispatch"], item["experts"]) for item in table["candidates"]}
        assert pairs == {(d, e) for d in registry().dispatch for e in registry().experts}
        assert all(item["reasons"] for item in table["candidates"] if item["verdict"] == "refused")
    assert "scheme unquantized" in invoke("explain", SHAPE, "--device", "h200", "--scheme", "all").stdout


def test_one_scheme_that_nothing_can_run_is_an_error_and_among_several_an_answer(refused, explained, monkeypatch):
    for name in list(registry().experts):
        if name not in ("torch", "triton"):
            monkeypatch.delitem(registry().experts, name)
    other = [name for name in registry().quant_methods if name != "unquantized"]
    if not other:
        pytest.skip("no package with another scheme is installed")
    assert "no pair of backends can run this layer" in refused("explain", SHAPE, "--scheme", other[0])
    (group,) = explained(SHAPE, "--scheme", "unquantized", "--scheme", other[0])["groups"]
    assert group["schemes"][1]["scheme"] == other[0]
    assert all(item["verdict"] == "refused" for item in group["schemes"][1]["candidates"])


def test_backends_that_are_insisted_on(explained, refused):
    found = explained(SHAPE, "--device", "cpu", "--world", "4", "--dispatch", "all_gather")["groups"][0]["plan"]
    assert {item["dispatch"] for item in found["costs"]} == {"all_gather"}
    assert "carries no tokens between ranks" in refused("explain", SHAPE, "--world", "4", "--dispatch", "local")


def test_page_is_whole_and_needs_nothing_from_elsewhere(written):
    text = written(SHAPE, "--device", "h200", "--world", "16", "--scheme", "all").read_text()
    page = Page(text)
    assert page.links == []
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "@import" not in text
    assert "url(" not in text
    words = " ".join(page.words)
    for name in (*registry().dispatch, *registry().experts, *registry().quant_methods):
        assert name in words
    assert "carries no tokens between ranks" in words
    assert "measured by this project on one H200" in words


def test_page_and_json_at_once(invoke, tmp_path):
    file = tmp_path / "explained.html"
    result = invoke("explain", SHAPE, "--device", "cpu", "--html", file, "--json")
    assert json.loads(result.stdout)["source"] == SHAPE
    assert file.exists()


def test_names_of_plugins_are_text_and_not_markup(monkeypatch, written):
    candidate = attrs.evolve(registry().experts["torch"], name="<b>acme")
    monkeypatch.setitem(registry().experts, "<b>acme", candidate)
    text = written(SHAPE, "--device", "cpu").read_text()
    assert "&lt;b&gt;acme" in text
    assert "<b>acme" not in text


PROBE = """<script>
addEventListener("load", () => {
  const root = document.documentElement, cells = [...document.querySelectorAll("td, th")];
  const chosen = document.querySelectorAll(".matrix td.chosen");
  document.title = JSON.stringify({
    overflow: root.scrollWidth - root.clientWidth,
    cells: cells.length,
    hidden: cells.filter(cell => !cell.closest("details") && !cell.getBoundingClientRect().height).length,
    chosen: chosen.length,
    colour: getComputedStyle(chosen[0]).color,
    ink: getComputedStyle(document.body).color,
  });
});
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [400, 1280])
def test_in_a_browser(width, written, tmp_path):
    """It is laid out without an error, every cell can be seen, and the page itself never scrolls sideways."""
    file = written(SHAPE, "--device", "h200", "--world", "16", "--tokens", "64")
    probed = tmp_path / "probed.html"
    probed.write_text(file.read_text().replace("</body>", PROBE + "</body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1200", "--virtual-time-budget=2000",
               "--dump-dom", probed.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stdout[:2000]
    seen = json.loads(html.unescape(title[1]))
    assert seen["overflow"] <= 0
    assert seen["cells"] > 20
    assert seen["hidden"] == 0
    assert seen["chosen"] == 1
    assert seen["colour"] != seen["ink"]
