"""Every code block of README, documentation and adapters' READMEs runs, and prints what it says.

The blocks of a page run in their order in a directory of their own, shell and Python, as printed.
It holds what a reader brings: a model, data, a run, and the checkout's folder `integrations`.
"""

import contextlib
import doctest
import io
import json
import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import NamedTuple

import field
import pytest

import tokenweights as tw
from tokenweights.recipes import kinds
from tokenweights.report import append_metrics

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md"),
    *sorted(DOCS.rglob("*.md")),
    *sorted(ROOT.glob("integrations/*/README.md")),
]
# Commands that cannot run in this test, and what holds them to what they say instead.
NOT_HERE = {
    r"make [a-z]": "a target sets up an environment, or runs this very test; it is looked up below",
    r"pip install": "it needs the index; tests/test_distributions.py installs the wheels",
    r"-m tokenweights_verl": "GPUs and VeRL; integrations/verl/tests/test_docs.py composes it",
    r"-m tokenweights_openrlhf": "GPUs and OpenRLHF; its tests/test_readme.py parses it",
    r"ray start": "a node of a cluster",
    r"prepare_data\.py": "data of the Hub; integrations/verl/tests/test_prepare_data.py",
    r"-m tokenweights_lab\.warm_start": "1,100 training steps; its tests/test_warm_start.py",
}
# Scripts that would start a trainer say instead what they would start.
DRY = {"DRY_RUN": "1", "PROMPTS": "48000"}

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
    return page.relative_to(ROOT).as_posix() if page.is_relative_to(ROOT) else page.name


def commands(script: str) -> list[str]:
    """The commands of a script, each with its continued lines; a here-document stays whole."""
    found: list[str] = []
    end = ""
    for line in script.splitlines():
        if end or (found and found[-1].endswith("\\")):
            found[-1] += "\n" + line
            end = "" if line == end else end
        elif line.strip() and not line.startswith("#"):
            found.append(line)
        here = re.search(r"<<\s*'?(\w+)'?", line)
        end = here[1] if here else end
    return found


def reason_against(command: str) -> str | None:
    return next((why for pattern, why in NOT_HERE.items() if re.search(pattern, command)), None)


def languages(page: Path) -> tuple[str, ...]:
    """What runs of a page: its Python does not where OpenRLHF's environment is needed."""
    elsewhere = ("docs/guides/openrlhf.md", "integrations/openrlhf/README.md")
    return ("bash",) if name(page) in elsewhere else ("bash", "python")


def brought(folder: Path) -> None:
    """What a reader of the pages has."""
    from tokenweights_lab import policy_path, problems
    from tokenweights_lab.forking import python_with

    (folder / "integrations").symlink_to(ROOT / "integrations")
    for model in ("my/model", "Qwen/Qwen3-0.6B"):
        shutil.copytree(policy_path(), folder / model)
    rows = [{"prompt": p.prompt, "answer": p.answer} for p in problems("train", 2)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    append_metrics(folder / "runs/demo/metrics.jsonl", {"step": 0, "reward": -1.0})
    programs = {
        "python": "",
        "tokenweights": "-m tokenweights",
        "torchrun": "-m torch.distributed.run",
    }
    python = python_with("trl.trainer.grpo_trainer", "peft", "datasets", "tokenweights.report")
    for program, module in programs.items():
        path = folder / ".bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\nexec "{python}" {module} "$@"\n')
        path.chmod(0o755)


def printed_by_shell(script: str, folder: Path, place: str) -> str:
    lines = [command for command in commands(script) if reason_against(command) is None]
    path = f"{folder / '.bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=folder,
        env=os.environ | DRY | {"PATH": path, "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, f"{place}:\n{script}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


def printed(source: str, namespace: dict, *, file: str, line: int) -> str:
    # Leading empty lines make tracebacks point at the line of the page.
    code = compile("\n" * (line - 1) + source, file, "exec", dont_inherit=True)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, namespace)
    return output.getvalue()


def run_page(page: Path, folder: Path) -> None:
    """Runs the blocks of a page in order; what is printed has to be the text block that follows."""
    namespace, output = {"__name__": "__main__"}, None
    for block in blocks(page):
        place = f"{name(page)}:{block.line}"
        if block.language not in (*languages(page), "text"):
            output = None
        elif block.language == "python" and (file := re.match(r"# (\w+\.py)\n", block.text)):
            (folder / file[1]).write_text(block.text)
        elif block.language == "python":
            output = printed(block.text, namespace, file=str(page), line=block.line)
        elif block.language == "bash":
            output = printed_by_shell(block.text, folder, place)
        elif output is not None and not block.after:
            same = doctest.OutputChecker().check_output(block.text, output, doctest.ELLIPSIS)
            assert same, f"{place} should say\n{output}"
            output = None


def runs(page: Path) -> bool:
    return any(block.language in languages(page) for block in blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=name)
def test_blocks_run_and_print_what_follows(page, tmp_path, monkeypatch):
    for adapter in ("tokenweights_trl", "tokenweights_lab"):
        pytest.importorskip(adapter)
    warnings.simplefilter("ignore", FutureWarning)  # the trainer's own
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    brought(tmp_path)
    run_page(page, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "```bash\ntokenweights inpsect my/model\n```\n",
        "```bash\ntokenweights recipes\npython -m tokenweights_trl.trian --help\n```\n",
        "```bash\ntokenweights report runs/nowhere \\\n  --output page.html\n```\n",
        "```bash\nfalse | true\n```\n",
        "```bash\ntokenweights recipes full --json\n```\n\n```text\n{}\n```\n",
        "```python\nimport tokenweights.nothing\n```\n",
    ],
    ids=["misspelt", "second line", "nothing there", "in a pipe", "says another", "python"],
)
def test_a_command_that_does_not_run_is_found(text, tmp_path):
    pytest.importorskip("tokenweights_lab")
    brought(tmp_path)
    (tmp_path / "page.md").write_text(text)
    with pytest.raises((AssertionError, ImportError)):
        run_page(tmp_path / "page.md", tmp_path)


def test_what_does_not_run_here_is_somewhere():
    scripts = [block.text for page in PAGES for block in blocks(page) if block.language == "bash"]
    for pattern in NOT_HERE:
        assert any(re.search(pattern, script) for script in scripts), f"no page has {pattern}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_languages_are_those_that_run(page):
    # A block under another name would not be run; one without a name is text.
    used = {block.language for block in blocks(page)}
    assert used <= {"bash", "python", "text", "json", ""}, used


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for block in blocks(page):
        if block.language == "bash":
            for line in re.findall(r"^\s*make ([a-z -]+)", re.sub("#.*", "", block.text), re.M):
                assert set(line.split()) <= targets, f"{name(page)}: make {line}"


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
