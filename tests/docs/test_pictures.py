"""The pictures of rows and columns are what their script draws from the embedded policy."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("tokenweights_lab")
IMAGES = Path(__file__).parents[2] / "docs" / "images"
NUMBER = re.compile(r"\d+\.\d+|\d+")


@pytest.fixture(scope="module")
def drawn():
    path = IMAGES / "rows_and_columns.py"
    spec = importlib.util.spec_from_file_location("rows_and_columns", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pictures()


@pytest.mark.parametrize("name", ["row.svg", "column.svg"])
def test_a_picture_is_drawn_from_the_policy(drawn, name):
    """Up to the rounding of another machine."""
    kept = (IMAGES / name).read_text(encoding="utf-8")
    assert NUMBER.sub("0", kept) == NUMBER.sub("0", drawn[name])
    numbers = [[float(each) for each in NUMBER.findall(text)] for text in (kept, drawn[name])]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.15)
    assert f'--8<-- "images/{name}"' in (IMAGES.parent / "idea.md").read_text(encoding="utf-8")


def test_a_row_looks_back_and_a_column_is_looked_back_at(drawn):
    bars = re.findall(r'class="bar" x="([\d.]+)"', drawn["row.svg"])
    (mark,) = re.findall(r'class="mark" x="([\d.]+)"', drawn["row.svg"])
    assert bars and all(float(x) <= float(mark) + 2 for x in bars)
    later = re.findall(r'class="bar" x="([\d.]+)"', drawn["column.svg"])
    (mark,) = re.findall(r'class="mark" x="([\d.]+)"', drawn["column.svg"])
    assert later and all(float(x) > float(mark) for x in later)
