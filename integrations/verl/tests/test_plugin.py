"""The plug-in loads where VeRL is imported, and says so where it does not."""

import os
import subprocess
import sys

import pytest
from cpu_platform import ENVIRONMENT
from tokenweights import TokenWeightsError
from tokenweights_lab import policy_path

from tokenweights_verl.plugin import require_plugin

pytestmark = pytest.mark.versions

LIST = "from verl.trainer.ppo.v1.trainer_base import TRAINER_REGISTRY as t; print(sorted(t))"


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("first", ["verl", "tokenweights_verl.engine", "tokenweights_verl.trainer"])
def test_importing_either_registers_the_trainer(first):
    run = python("-c", f"import {first}; {LIST}")
    for mode in ("sync", "colocate_async", "separate_async"):
        assert f"'tokenweights_{mode}'" in run.stdout, run.stderr
    assert "does not load" not in run.stderr


def test_a_plugin_that_fails_is_seen(tmp_path):
    (tmp_path / "transfer_queue.py").write_text("raise ImportError('a broken installation')")
    path = f"{tmp_path}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"
    run = python("-c", "import verl", PYTHONPATH=path, VERL_USE_EXTERNAL_MODULES="")
    assert "plug-in tokenweights does not load" in run.stderr
    assert "a broken installation" in run.stderr
    run = python("-m", "tokenweights_verl.train", PYTHONPATH=path, VERL_USE_EXTERNAL_MODULES="")
    assert run.returncode != 0 and "a broken installation" in run.stderr


def test_the_launcher_refuses_a_policy_that_leaves_it_out(monkeypatch):
    require_plugin()
    for policy in ("none", "other"):
        monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
        with pytest.raises(TokenWeightsError, match=policy):
            require_plugin()
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "other, tokenweights")
    require_plugin()


def test_a_misspelt_recipe_ends_the_launcher_before_ray_starts(tmp_path):
    run = python(
        *("-m", "tokenweights_verl.train", "token_weights.recipe=low2hihg"),
        f"hydra.run.dir={tmp_path}",
    )
    assert run.returncode == 1
    assert "Did you mean 'low2high'?" in run.stderr
    assert "ray init" not in run.stdout and "Traceback" not in run.stderr


def test_a_layer_that_the_model_does_not_have_ends_it_too(tmp_path):
    run = python(
        *("-m", "tokenweights_verl.train", "token_weights.recipe={name: low2high, layers: [40]}"),
        f"actor_rollout_ref.model.path={policy_path()}",
        f"hydra.run.dir={tmp_path}",
    )
    assert run.returncode == 1
    assert "expected `layers` among the attention layers [0, 1, 2" in run.stderr
    assert "ray init" not in run.stdout and "Traceback" not in run.stderr
