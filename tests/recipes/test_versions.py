"""Versions of trainers."""

import pytest

from tokenweights import TokenWeightsError
from tokenweights.recipes import require_version, versions


@pytest.mark.parametrize("other", ["0.11.0", "0.9.4", "0.12", "0.12.0.dev1", "1.0.0"])
def test_another_version_is_refused_or_warned_of(other, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: other)
    message = rf"`trainer` >=0\.11\.2,<0\.12, got {other}.*TOKENWEIGHTS_ANY_VERSION=1"
    with pytest.raises(TokenWeightsError, match=message):
        require_version("trainer", "0.11.2", "0.12")
    monkeypatch.setenv("TOKENWEIGHTS_ANY_VERSION", "1")
    with pytest.warns(UserWarning, match=message):
        require_version("trainer", "0.11.2", "0.12")


@pytest.mark.parametrize("right", ["0.11.2", "0.11.3.dev1", "0.11.10.post1"])
def test_a_tested_version_is_taken(right, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: right)
    require_version("trainer", "0.11.2", "0.12")
