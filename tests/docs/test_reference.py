"""The reference lists every public name once, and the navigation every page once."""

import ast
import inspect
import re
from pathlib import Path

import yaml

import tokenweights
import tokenweights.report
from tokenweights.recipes import kinds

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ADAPTERS = ("trl", "openrlhf")
# Its package exports nothing, since its trainer imports it halfway: names come from the modules.
PLUG_IN = "tokenweights_verl."
# The parts of a recipe have a page and a namespace of their own.
PARTS = "tokenweights.recipes."


def exported(adapter: str) -> list[str]:
    """The names that a package exports, read without importing the adapter's trainer."""
    source = ROOT / f"integrations/{adapter}/src/tokenweights_{adapter}/__init__.py"
    body = ast.parse(source.read_text()).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    imports = [node for node in body if isinstance(node, ast.ImportFrom)]
    return [name.asname for node in imports for name in node.names if name.asname]


def test_the_reference_lists_every_public_name_once():
    public = {
        "tokenweights": tokenweights.__all__,
        "tokenweights.report": tokenweights.report.__all__,
        **{f"tokenweights_{adapter}": exported(adapter) for adapter in ADAPTERS},
    }
    expected = [f"{module}.{label}" for module, labels in public.items() for label in labels]
    pages = [page.read_text() for page in (DOCS / "api").glob("*.md")]
    listed = [label for text in pages for label in re.findall(r"^::: (\S+)", text, re.M)]
    elsewhere = (PLUG_IN, PARTS)
    assert sorted(label for label in listed if not label.startswith(elsewhere)) == sorted(expected)


def test_the_reference_lists_every_part_of_a_recipe_once():
    listed = re.findall(r"^::: (\S+)", (DOCS / "api/parts.md").read_text(), re.M)
    made = (*kinds.SIGNALS, *kinds.RULES, *kinds.CONDITIONS)
    parts = [f"{each.__module__}.{each.__name__}" for each in made]
    assert listed == [f"{PARTS}Signal", f"{PARTS}Rule", *parts]


def test_the_reference_lists_names_that_the_plug_in_has():
    text = (DOCS / "api/verl.md").read_text()
    for label in re.findall(r"^::: (\S+)", text, re.M):
        package, module, defined = label.split(".")
        source = ROOT / f"integrations/verl/src/{package}/{module}.py"
        body = ast.parse(source.read_text()).body
        assert defined in [getattr(node, "name", None) for node in body], label


def test_the_navigation_lists_every_page_once():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry
        return [page for value in inner for page in pages(value)]

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    existing = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(pages(navigation)) == sorted(existing)


def test_the_glossary_explains_every_axis_of_the_public_functions():
    annotation = re.compile(r"\[Tensor, ['\"]([^'\"]*)['\"]\]")
    used = set()
    for label in tokenweights.__all__:
        value = getattr(tokenweights, label)
        if not (inspect.isclass(value) and issubclass(value, Exception)):
            for axes in annotation.findall(str(inspect.signature(value))):
                names = re.sub("[#*]", "", axes).split()
                used |= {name for name in names if not name.isdigit()}  # fixed sizes
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "shapes.md").read_text(), re.M)
    assert {"batch", "token"} < used
    assert used == set(re.findall(r"`(\w+)`", " ".join(rows)))
