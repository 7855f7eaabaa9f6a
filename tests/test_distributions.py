"""The five distributions are of one version, pin each other alike, and can be cited.

Their wheels are built and installed into an empty environment, outside the repository, as a user
does: first the library alone, then all that TRL's adapter needs, at the lowest versions and at the
newest. torch stays the one of the tests.
"""

import importlib.util
import os
import re
import subprocess
import venv
from importlib import metadata
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


TORCH = f"torch=={metadata.version('torch').partition('+')[0]}"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
# Dependencies that only a machine with GPUs makes sense of: these wheels are installed without.
APART = ("tokenweights_verl", "tokenweights_openrlhf")
EXTRAS = "tokenweights[all]"


class Environment:
    """An environment of its own, in a folder outside the repository."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.wheels = folder, folder / "env" / "bin", folder / "wheels"
        venv.create(folder / "env", with_pip=True)
        done = self.pip("wheel", "--no-deps", "--wheel-dir", self.wheels, *FOLDERS)
        if "No matching distribution found for hatchling" in done.stderr:
            reason = "no package index can be reached"
            pytest.fail(reason) if os.environ.get("REQUIRE_INDEX") else pytest.skip(reason)
        assert done.returncode == 0, done.stderr[-3000:]

    def run(self, *command: object) -> subprocess.CompletedProcess:
        """The end of a command, run outside the repository and without its paths."""
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            env=clean | {"PATH": f"{self.bin}{os.pathsep}{clean['PATH']}"},
            capture_output=True,
            text=True,
            timeout=1200,
        )

    def pip(self, *arguments: object) -> subprocess.CompletedProcess:
        options = ("--quiet", "--disable-pip-version-check")
        return self.run(self.bin / "python", "-m", "pip", *arguments, *options)

    def install(self, *arguments: object) -> None:
        done = self.pip("install", TORCH, "--find-links", self.wheels, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]

    def python(self, source: str, *switches: str) -> str:
        (self.folder / "script.py").write_text(source)
        done = self.run(self.bin / "python", *switches, self.folder / "script.py")
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("outside"))


def lowest(*folders: Path) -> list[str]:
    """The lower bounds of what these distributions name, as pins."""
    pins = {}
    for folder in folders:
        extras = project(folder).get("optional-dependencies", {})
        users = [line for name in ("capture", "report") for line in extras.get(name, [])]
        for line in [*project(folder)["dependencies"], *users]:
            name, _, bound = line.partition(">=")
            if bound and name != "torch":
                bound = bound.partition(",")[0].partition(";")[0].strip()
                parts = tuple(int(part) for part in bound.split("."))
                pins[name] = max(pins.get(name, parts), parts)
    return [f"{name}=={'.'.join(map(str, parts))}" for name, parts in sorted(pins.items())]


def core_pins() -> list[str]:
    names = [line.partition(">=")[0] for line in project(ROOT)["dependencies"]]
    return [pin for pin in lowest(ROOT) if pin.partition("==")[0] in names]


def readme_blocks() -> list[str]:
    return BLOCK.findall((ROOT / "README.md").read_text())


def test_the_library_alone_runs_outside_the_repository(environment):
    environment.install("tokenweights", *core_pins())
    found = environment.pip("list", "--format", "freeze").stdout
    assert "transformers" not in found and "matplotlib" not in found
    (fifteen, *_) = readme_blocks()
    place = environment.python(fifteen + "\nprint(tw.__file__, loss.item())")
    assert str(environment.bin.parent) in place
    version = environment.run(environment.bin / "tokenweights", "--version")
    assert version.stdout == f"tokenweights {tw.__version__}\n"
    listed = environment.run(environment.bin / "tokenweights", "recipes")
    assert listed.returncode == 0 and "low2high" in listed.stdout
    refused = environment.run(environment.bin / "tokenweights", "check", "lab")
    assert refused.returncode == 2 and "tokenweights[capture]" in refused.stderr


@pytest.mark.parametrize("versions", ["lowest", "newest"])
def test_all_of_it_runs_outside_the_repository(environment, versions):
    lab, trl = (ROOT / "integrations" / name for name in ("lab", "trl"))
    asked = (EXTRAS, "tokenweights-lab", "tokenweights-trl")
    pins = lowest(ROOT, lab, trl) if versions == "lowest" else ["--upgrade"]
    environment.install(*asked, *pins)
    apart = [wheel for wheel in environment.wheels.glob("*.whl") if wheel.name.startswith(APART)]
    assert len(apart) == 2 and environment.pip("install", "--no-deps", *apart).returncode == 0
    fifteen, inside_trl = readme_blocks()
    environment.python(fifteen)
    out = environment.python(inside_trl + "\nprint(trainer.state.global_step)")
    assert out.splitlines()[-1] == "2"
    (environment.folder / "prompt.txt").write_text("a-3b-1c+7?1>\n")
    for words in (
        "check lab",
        "inspect lab --prompt prompt.txt --generate 8 --recipe low2high",
        "report runs/mine",
    ):
        done = environment.run(environment.bin / "tokenweights", *words.split())
        assert done.returncode == 0, done.stderr[-3000:]
    for name in APART:
        source = f"import importlib.util as u; print(u.find_spec({name!r}).origin)"
        assert str(environment.bin.parent) in environment.python(source)
