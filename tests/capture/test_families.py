"""Every family of transformers is tapped right or refused, as docs/families.md says."""

import pytest
import transformers
from families import NOT_BUILT, RIGHT, documented, families, verdict


@pytest.mark.parametrize(("task", "family"), families())
def test_a_family_is_right_or_refused_as_documented(task, family):
    found = verdict(task, family)  # fails where an entropy is wrong
    version, page = documented()
    if transformers.__version__ == version:
        assert page[task, family] == found


def test_the_page_is_about_the_families_there_are():
    version, page = documented()
    if transformers.__version__ == version:
        assert set(page) == set(families())
    assert sum(what == RIGHT for what in page.values()) > 150
    assert sum(what == NOT_BUILT for what in page.values()) < len(page) / 3
