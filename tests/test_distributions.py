"""The five distributions are of one version, pin each other alike, and can be cited.

Their wheels are built and installed into an empty environment, outside the repository, as a user
does: first the library alone, then all that TRL's adapter needs, at the lowest versions and at the
newest. torch stays the one of the tests.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import tokenweights as tw

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on

ROOT = Path(__file__).parents[1]
INTEGRATIONS = ROOT / "integrations"
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


def test_every_adapter_has_the_report_extra():
    for folder in FOLDERS:
        if "-" in (found := project(folder))["name"] and folder.name != "lab":
            assert found["optional-dependencies"]["report"] == [f"tokenweights[report]=={SERIES}.*"]


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


def lend_torch(packages: Path) -> None:
    """Puts the torch of the tests among an environment's packages; pip cannot remove it."""
    own = metadata.distribution("torch")
    place = Path(str(own.locate_file("")))
    for name in ("torch", "torchgen", "functorch"):
        (packages / name).symlink_to(place / name)
    told = packages / f"torch-{own.version}.dist-info"
    told.mkdir()
    told.joinpath("METADATA").write_text(own.read_text("METADATA") or "")


class Environment:
    """An environment of its own, in a folder outside the repository."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.wheels = folder, folder / "env" / "bin", folder / "wheels"
        venv.create(folder / "env", with_pip=True)
        lend_torch(next((folder / "env" / "lib").glob("python*/site-packages")))
        done = self.pip("wheel", "--no-deps", "--wheel-dir", self.wheels, *FOLDERS)
        if "No matching distribution found for hatchling" in done.stderr:
            reason = "no package index can be reached"
            pytest.fail(reason) if os.environ.get("REQUIRE_INDEX") else pytest.skip(reason)
        assert done.returncode == 0, done.stderr[-3000:]

    def run(self, *command: object) -> subprocess.CompletedProcess:
        """The end of a command, run outside the repository and without its paths."""
        ours = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
        clean = {name: value for name, value in os.environ.items() if name not in ours}
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
        # Bytecode is made of what is imported, not of all that is there.
        done = self.pip("install", "--no-compile", TORCH, "--find-links", self.wheels, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]

    def python(self, source: str, *switches: str) -> str:
        (self.folder / "script.py").write_text(source)
        done = self.run(self.bin / "python", *switches, self.folder / "script.py")
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("outside"))


def lowest(*folders: Path, extras: tuple[str, ...] = ()) -> list[str]:
    """The lower bounds of what these distributions name, as pins; torch stays as it is."""
    pins: dict[str, tuple[int, ...]] = {}
    for folder in folders:
        optional = project(folder).get("optional-dependencies", {})
        named = [line for extra in extras for line in optional.get(extra, [])]
        for line in [*project(folder)["dependencies"], *named]:
            name, _, bound = line.partition(">=")
            if bound and name != "torch":
                parts = tuple(int(part) for part in bound.partition(",")[0].split("."))
                pins[name] = max(pins.get(name, parts), parts)
    return [f"{name}=={'.'.join(map(str, parts))}" for name, parts in sorted(pins.items())]


def readme_blocks() -> list[str]:
    return BLOCK.findall((ROOT / "README.md").read_text())


def looked_at(environment: Environment) -> None:
    """A model and a response through the console script."""
    (environment.folder / "prompt.txt").write_text("a-3b-1c+7?1>\n")
    inspect = "inspect lab --prompt prompt.txt --generate 8 --recipe low2high"
    for words in ("check lab", inspect):
        done = environment.run(environment.bin / "tokenweights", *words.split())
        assert done.returncode == 0, done.stderr[-3000:]


def test_an_index_shows_no_link_into_the_repository(environment):
    for wheel in environment.wheels.glob("tokenweights*.whl"):
        with zipfile.ZipFile(wheel) as opened:
            (name,) = (n for n in opened.namelist() if n.endswith(".dist-info/METADATA"))
            _, _, page = opened.read(name).decode().partition("\n\n")
        assert page.startswith("# ")
        targets = re.findall(r"\]\(([^)]*)\)", page)
        assert all(target.startswith("http") for target in targets), (wheel.name, targets)


def test_the_library_alone_runs_outside_the_repository(environment):
    environment.install("tokenweights", *lowest(ROOT))
    found = environment.pip("list", "--format", "freeze").stdout
    assert "transformers" not in found and "matplotlib" not in found
    (fifteen, *_) = readme_blocks()
    place = environment.python(fifteen + "\nprint(tw.__file__, loss.item())", "-W", "error")
    assert str(environment.bin.parent) in place
    version = environment.run(environment.bin / "tokenweights", "--version")
    assert version.stdout == f"tokenweights {tw.__version__}\n"
    listed = environment.run(environment.bin / "tokenweights", "recipes")
    assert listed.returncode == 0 and "low2high" in listed.stdout and not listed.stderr
    refused = environment.run(environment.bin / "tokenweights", "inspect", "lab", "--text", "x")
    assert refused.returncode == 2 and "pip install 'tokenweights[" in refused.stderr


def test_the_extras_run_at_their_lowest_versions(environment):
    pins = lowest(ROOT, INTEGRATIONS / "lab", extras=("capture", "report"))
    environment.install("tokenweights[all]", "tokenweights-lab", *pins)
    looked_at(environment)


@pytest.mark.parametrize("versions", ["lowest", "newest"])
def test_the_trl_adapter_runs_outside_the_repository(environment, versions):
    pins = lowest(ROOT, INTEGRATIONS / "lab", INTEGRATIONS / "trl", extras=("capture",))
    # What `datasets` brings needs newer ones than the library does.
    fitting = [pin for pin in pins if not pin.startswith(("numpy", "tqdm"))]
    chosen = [*fitting, "numpy>=2", "matplotlib>=3.9"] if versions == "lowest" else ["--upgrade"]
    environment.install("tokenweights[all]", "tokenweights-lab", "tokenweights-trl", *chosen)
    (_, inside_trl) = readme_blocks()
    # TRL logs every tenth step, and a report of a run without one is refused.
    logged = inside_trl.replace("max_steps=2", "max_steps=2, logging_steps=1")
    out = environment.python(logged + "\nprint(trainer.state.global_step)")
    assert out.splitlines()[-1] == "2"
    looked_at(environment)
    report = environment.run(environment.bin / "tokenweights", "report", "runs/mine")
    assert report.returncode == 0, report.stderr[-3000:]


def test_the_adapters_of_gpu_trainers_install(environment):
    wheels = [wheel for wheel in environment.wheels.glob("*.whl") if wheel.name.startswith(APART)]
    assert len(wheels) == len(APART)
    done = environment.pip("install", "--no-deps", *wheels)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in APART:
        source = f"import importlib.util as u; print(u.find_spec({name!r}).origin)"
        assert str(environment.bin.parent) in environment.python(source)


BUILD_SDIST = (
    "import os, sys; os.chdir(sys.argv[1]); import hatchling.build as b; b.build_sdist(sys.argv[2])"
)


def test_source_distributions_can_run_their_tests(environment, tmp_path):
    done = environment.pip(
        "install", *tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for folder in FOLDERS:
        done = environment.run(environment.bin / "python", "-c", BUILD_SDIST, folder, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    for archive in tmp_path.glob("*.tar.gz"):
        with tarfile.open(archive) as opened:
            opened.extractall(tmp_path, filter="data")
    folders = {path.name.rpartition("-")[0]: path for path in tmp_path.iterdir() if path.is_dir()}
    assert len(folders) == len(FOLDERS)
    whole = folders["tokenweights"]
    shipped = {str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file()} - {"PKG-INFO"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:  # these tests may themselves run from a source distribution
        assert set(tracked.stdout.split()) - shipped == set()
    for name, tests in (
        ("tokenweights", "tests/test_schedules.py"),
        ("tokenweights_lab", "tests/test_task.py"),
    ):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
        done = subprocess.run(command, cwd=folders[name], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
