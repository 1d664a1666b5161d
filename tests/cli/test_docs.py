"""`moe-core docs`."""

from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


def test_every_page_is_listed_with_its_title(invoke):
    listed = invoke("docs").output.splitlines()
    assert sorted(line.split()[0] for line in listed) == sorted(
        path.stem for path in DOCS.glob("*.md") if path.stem != "index"
    )
    assert any(line.split(maxsplit=1) == ["conformance", "The conformance kit"] for line in listed)


@pytest.mark.parametrize("named", ["hooks", "docs/hooks.md"])
def test_a_page_is_printed_as_it_is(invoke, named):
    assert invoke("docs", named).output == (DOCS / "hooks.md").read_text(encoding="utf-8")


def test_a_page_that_is_not_there(invoke):
    result = invoke("docs", "hoks")
    assert result.exit_code == 1
    assert "there is no page 'hoks'; did you mean hooks?" in result.output
