"""VeRL's Megatron engine class gives the entropies of each sequence alone."""

import importlib.util
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch
from ranks import results_by_case
from verl.workers.engine import EngineRegistry

sys.path.append(str(Path(__file__).parents[3] / "tests"))
from capture.megatron_ranks import PROBED, sequences
from capture.megatron_reference import Reference
from megatron_run import CASES

pytestmark = pytest.mark.megatron


@pytest.fixture(scope="module", autouse=True)
def _megatron_core():
    if importlib.util.find_spec("megatron") is None:
        # On a user's machine without it these tests are skipped; in `make test` they have to run.
        assert "REQUIRE_MEGATRON" not in os.environ, "megatron-core is not installed"
        pytest.skip("needs megatron-core")


def test_the_engine_has_the_seams_of_the_adapter():
    """A failure here names what VeRL has changed; the adapter's code has to follow."""
    from verl.workers.engine import MegatronEngineWithLMHead as Engine

    seams = {
        "forward_backward_batch": ["self", "data", "loss_function", "forward_only"],
        "forward_step": ["self", "batch_iter", "model"],
    }
    for name, names in seams.items():
        taken = list(inspect.signature(getattr(Engine, name)).parameters)
        assert taken[: len(names)] == names, f"VeRL's {Engine.__name__}.{name} takes {taken}"
    written = {
        Engine.forward_backward_batch: (
            "model=self.module", "make_batch_generator", "indices=indices, data=data"
        ),
        Engine.forward_step: ("batch: TensorDict = next(batch_iter)",),
    }  # fmt: skip
    for method, passages in written.items():
        source = inspect.getsource(method)
        for words in passages:
            assert words in source, f"VeRL's {method.__qualname__} has changed: no {words!r}"
    from tokenweights_verl.engine import VENDOR
    from tokenweights_verl.megatron import TokenWeightsMegatronEngine

    engines = EngineRegistry._engines["language_model"]["megatron"]
    assert engines["cuda", VENDOR] is TokenWeightsMegatronEngine


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    runs = {"four": (4, tuple(CASES))}
    return results_by_case("megatron_run.py", runs, lambda run: tmp_path_factory.mktemp(run))


@pytest.mark.parametrize("case", CASES)
def test_entropies_are_those_of_each_sequence_alone(results, case):
    model, seen = Reference(groups=4), 0
    for found in results("four", case):
        if not found:
            continue  # not the last stage
        seen += 1
        probed, plain = found["probed"], found["plain"]
        names = {f"attention_entropy_{layer}" for layer in (PROBED, 0)}
        assert set(probed) == set(plain) | names
        for row, ids in enumerate(sequences()):
            for layer in (PROBED, 0):
                with torch.no_grad():
                    log_probs, entropy = model(ids, layer)
                got = probed[f"attention_entropy_{layer}"][row]
                torch.testing.assert_close(got.double(), entropy, atol=1e-5, rtol=0)
            own = probed["log_probs"][row]
            torch.testing.assert_close(own[:-1].double(), log_probs, atol=1e-4, rtol=0)
            assert torch.equal(own, plain["log_probs"][row])
    assert seen == (2 if CASES[case].pp > 1 else 4)
