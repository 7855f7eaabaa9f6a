"""Every code block of the documentation runs, and prints what the page says it prints."""

import contextlib
import doctest
import importlib.util
import io
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import field
import pytest

import tokenweights as tw
from tokenweights.recipes import kinds

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# Pages whose code the suite of another environment runs.
ELSEWHERE = {"docs/guides/openrlhf.md"}
# Pages about a distribution that the core does not depend on.
NEEDS = {
    "README.md": "tokenweights_trl",
    "docs/guides/see-it.md": "tokenweights_lab",
    "docs/guides/trl.md": "tokenweights_trl",
    "docs/guides/your-own-rule.md": "tokenweights_trl",
}

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


class Block(NamedTuple):
    language: str
    text: str
    line: int
    after: str  # what stands between the block before and this one


def blocks(page: Path) -> list[Block]:
    text, found, end = page.read_text(), [], 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        found.append(Block(match[1], match[2], line, text[end : match.start()].strip()))
        end = match.end()
    return found


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def with_language(*languages: str) -> list[Path]:
    pages = [page for page in PAGES if name(page) not in ELSEWHERE]
    return [page for page in pages if any(block.language in languages for block in blocks(page))]


def printed(source: str, namespace: dict, *, file: str, line: int) -> str:
    # Leading empty lines make tracebacks point at the line of the page.
    code = compile("\n" * (line - 1) + source, file, "exec", dont_inherit=True)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, namespace)
    return output.getvalue()


@pytest.mark.parametrize("page", with_language("python"), ids=name)
def test_python_blocks_run_and_print_what_follows(page, tmp_path, monkeypatch):
    if name(page) in NEEDS:
        pytest.importorskip(NEEDS[name(page)])
        warnings.simplefilter("ignore", FutureWarning)  # the trainer's own
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    namespace, output = {"__name__": "__main__"}, None
    for block in blocks(page):
        if block.language == "python" and (file := re.match(r"# (\w+\.py)\n", block.text)):
            Path(file[1]).write_text(block.text)
        elif block.language == "python":
            output = printed(block.text, namespace, file=str(page), line=block.line)
        elif block.language == "text" and output is not None and not block.after:
            same = doctest.OutputChecker().check_output(block.text, output, doctest.ELLIPSIS)
            assert same, f"{name(page)}:{block.line} should say\n{output}"
            output = None


@pytest.mark.parametrize("page", with_language("bash"), ids=name)
def test_commands_name_targets_and_modules_that_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for block in blocks(page):
        if block.language != "bash":
            continue
        commands = re.sub(r"#.*", "", block.text.replace("\\\n", " "))
        for line in re.findall(r"^\s*make ([a-z -]+)", commands, re.M):
            assert set(line.split()) <= targets, f"{name(page)}: make {line}"
        for module in re.findall(r"-m (\w+(?:\.\w+)+)", commands):
            if module.split(".")[0] == NEEDS.get(name(page)):
                pytest.importorskip(NEEDS[name(page)])
            # An adapter with an environment of its own is not installed here.
            ours = any(ROOT.glob(f"integrations/*/src/{module.replace('.', '/')}.py"))
            assert ours or importlib.util.find_spec(module), f"{name(page)}: python -m {module}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    prose = FENCE.sub("", page.read_text())
    for target in (first or second for first, second in LINK.findall(prose)):
        if not re.match(r"[a-z]+:|#", target):
            path = page.parent / target.split("#")[0]
            assert path.exists(), f"{name(page)} links to {target}"


def test_the_table_of_the_fields_rules_is_true():
    page = (DOCS / "field.md").read_text()
    assert page.partition(field.BEGIN)[2].partition(field.END)[0].strip() == field.table()


def test_every_part_of_a_recipe_is_in_the_tables():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", (DOCS / "recipes.md").read_text(), re.M)
    parts = {made.kind: made for made in (*kinds.SIGNALS, *kinds.RULES)}
    assert [kind for kind, _, _ in rows] == list(parts)
    for kind, reads, meaning in rows:
        made = parts[kind]
        assert meaning == (made.__doc__ or "").partition("\n")[0].rstrip(".")
        if made in kinds.SIGNALS and "signal" not in reads and reads != "as its parts":
            assert reads == (", ".join(f"`{name}`" for name in made.columns) or "the mask")


def test_every_recipe_is_described_as_it_describes_itself():
    page = DOCS / "recipes.md"
    sections = re.findall(r"^### `(\w+)`$(.*?)(?=^##|\Z)", page.read_text(), re.M | re.S)
    described = {label: FENCE.search(body)[2].rstrip("\n") for label, body in sections}
    assert described == {label: tw.recipe(label).describe() for label in tw.recipe_names()}
    assert len(sections) == len(described)
