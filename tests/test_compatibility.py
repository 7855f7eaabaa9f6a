"""The table of versions says what was run, for the versions that are pinned."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("compatibility", ROOT / ".ci" / "compatibility.py")
compatibility = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(compatibility)

PINS = {"trl": ROOT / "constraints.txt"} | {
    adapter: ROOT / "integrations" / adapter / "constraints.txt" for adapter in ("verl", "openrlhf")
}
SUITE = '<testsuites><testsuite><testcase name="a"/><testcase name="b">{}</testcase></testsuite>'


def pins(path: Path) -> dict[str, str]:
    found = dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), re.M))
    if path.parent.name == "openrlhf" and path.name == "constraints.txt":
        found |= dict(
            re.findall(r"^([\w.-]+)==(\S+)$", (path.parent / "no-deps.txt").read_text(), re.M)
        )
    return found


def row(adapter: str, pinned: dict[str, str]) -> str:
    versions = (pinned[name] for name in compatibility.COLUMNS)
    return " | ".join((f"{adapter} {pinned[adapter]}", "3.11", *versions))


@pytest.mark.parametrize("adapter", compatibility.TRAINERS)
def test_both_sets_of_versions_are_in_the_table(adapter):
    table = compatibility.table(compatibility.PAGE.read_text())
    own = pins(PINS[adapter])
    extra = ROOT / "integrations" / adapter / "constraints-gpu.txt"
    theirs = own | pins(extra)
    known = {row(adapter, own): "the whole suite"}
    known[row(adapter, theirs)] = "contract, refusals, two steps"
    found = {key: what for key, what in table.items() if key.startswith(f"{adapter} ")}
    assert found.items() >= known.items()
    # A version that the tests do not install is in a comment of the file.
    apart = dict(re.findall(r"^# (\w+)==(\S+)", extra.read_text(), re.M))
    assert found.keys() <= known.keys() | {row(adapter, theirs | apart)}


@pytest.mark.parametrize(
    ("name", "trouble", "what"),
    [
        ("trl", "", "the whole suite"),
        ("trl+gpu", "", "contract, refusals, two steps"),
        ("trl", "<skipped/>", "the whole suite"),
        ("trl", "<failure/>", None),
        ("trl+gpu", "<error/>", None),
        ("core", "", None),
        ("trl+megatron", "", None),
    ],
)
def test_only_what_passed_gets_a_row(tmp_path, name, trouble, what):
    versions = {"python": "3.11", "trl": "9", "torch": "8", "transformers": "7", "numpy": "6"}
    (tmp_path / f"{name}.json").write_text(json.dumps(versions))
    (tmp_path / f"{name}.xml").write_text(SUITE.format(trouble) + "</testsuites>")
    found = compatibility.rows(tmp_path)
    assert found == ({} if what is None else {"trl 9 | 3.11 | 8 | 7 | 6": what})


def test_rows_are_added_and_replaced_and_the_rest_of_the_page_stays():
    rows = (compatibility.HEAD, compatibility.RULE, "| trl 1 | 3.11 | 2 | 3 | 4 | old |")
    text = "\n".join(("before", "", *rows, "", "after", ""))
    made = compatibility.page(text, {"verl 1 | 3.11 | 2 | 3 | 4": "new"})
    made = compatibility.page(made, {"trl 1 | 3.11 | 2 | 3 | 4": "newer"})
    assert compatibility.table(made) == {
        "trl 1 | 3.11 | 2 | 3 | 4": "newer",
        "verl 1 | 3.11 | 2 | 3 | 4": "new",
    }
    assert made.startswith("before\n\n|") and made.endswith("|\n\nafter\n")
    assert compatibility.page(made, {}) == made


def test_the_page_names_the_pinned_megatron_core():
    (pinned,) = pins(ROOT / "constraints-megatron.txt").values()
    for page in (compatibility.PAGE, ROOT / "docs" / "engines.md"):
        assert re.search(rf"[Mm]egatron-core {re.escape(pinned)}\b", page.read_text())
