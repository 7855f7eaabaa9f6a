"""The five distributions are of one version, pin each other alike, and can be cited."""

import importlib.util
from pathlib import Path

import pytest
import yaml

import tokenweights as tw

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT, *sorted(path.parent for path in ROOT.glob("integrations/*/pyproject.toml"))]
SERIES = ".".join(tw.__version__.split(".")[:2])


def project(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_versions_agree_and_siblings_are_pinned_to_the_series(folder):
    found = project(folder)
    assert found["version"] == tw.__version__
    lists = [found["dependencies"], *found.get("optional-dependencies", {}).values()]
    ours = [line for lines in lists for line in lines if line.startswith("tokenweights")]
    if folder != ROOT:
        assert ours and all(line.endswith(f"=={SERIES}.*") for line in ours), ours


def test_all_joins_the_extras_of_users():
    extras = project(ROOT)["optional-dependencies"]
    users = [name for name in extras if name not in ("all", "test", "lint", "docs")]
    assert extras["all"] == [f"tokenweights[{','.join(users)}]"]


def test_the_script_is_there():
    module, _, name = project(ROOT)["scripts"]["tokenweights"].partition(":")
    assert (module, name) == ("tokenweights.__main__", "main")
    assert importlib.util.find_spec(module)


def test_the_citation_is_of_this_version():
    citation, own = yaml.safe_load((ROOT / "CITATION.cff").read_text()), project(ROOT)
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]
    assert (citation["title"], citation["version"]) == (own["name"], own["version"])
    assert citation["license"] == own["license"]
    assert citation["abstract"] == own["description"]
    (paper,) = citation["references"]
    assert paper["title"].startswith("Not All Tokens Learn Alike") and len(paper["authors"]) == 4
    assert "2605.07660" in paper["url"]
