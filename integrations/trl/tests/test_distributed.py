"""Two ranks train exactly as one rank does on the same global batch."""

import pytest
from ranks import outcome

GENERATIONS = 4  # responses to a prompt, as in `tiny`
LOW2HIGH = {"name": "low2high", "warmup_steps": 4, "temperature": 0.2}
CASES = {
    "low2high, from the generation": {"recipe": LOW2HIGH},
    "low2high, from the old log-prob pass": {
        "recipe": LOW2HIGH,
        "num_iterations": 2,
        "max_steps": 4,
    },
    "low2high, from a scoring pass": {"recipe": {**LOW2HIGH, "alignment": "own"}},
    "low2high, with a gradient probe": {"recipe": LOW2HIGH, "gradient_probe_steps": 1},
    "anchor20 over the selected tokens": {"recipe": "anchor20"},
    "weights over their sum": {"recipe": {**LOW2HIGH, "denominator": "weight_sum"}},
    "random20": {"recipe": "random20"},
    # Selections over the whole rollout batch, with bounds that the tiny policy's entropies meet.
    "predictive_high20_batch": {"recipe": "predictive_high20_batch"},
    "surprisal_boost10_damp10": {"recipe": {"name": "surprisal_boost10_damp10", "below": 9.0}},
    "covariance_drop": {"recipe": {"name": "covariance_drop", "low": 0.0, "fraction": 0.2}},
    # One generation is one micro-batch here, and the responses to a prompt lie on both ranks.
    "a prompt on both ranks": {
        "recipe": {"rule": {"kind": "top", "scope": "prompt"}, "signal": "surprisal"},
        "steps_per_generation": 1,
    },
}


# Soft weights; all others are selections.
RESCALED = [case for case in CASES if case.startswith(("low2high", "weights over"))]


# How accelerate is told to shard parameters, gradients and optimizer states, layer by layer.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What came out of all cases on one rank."""
    return outcome("distributed_run.py", 1, tmp_path_factory.mktemp("one") / "1.json", CASES)


def close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-5 * max(1.0, abs(a))


@pytest.mark.parametrize("settings", [{}, FSDP2], ids=["DDP", "FSDP2"])
def test_two_ranks_agree_with_one(tmp_path, alone, settings):
    two = outcome("distributed_run.py", 2, tmp_path / "2.json", CASES, **settings)
    assert alone.keys() == two.keys() == CASES.keys()
    for case in CASES:
        assert bool(two[case]["sharded"]) == bool(settings)
        agree(case, alone[case], two[case])


def agree(case: str, one: dict, two: dict) -> None:
    assert one["source"] == two["source"]
    assert two["spread"] == 0.0
    assert len(one["history"]) == len(two["history"]) >= 2
    assert any("token_weights/weight_mean" in entry for entry in one["history"])
    assert any("gradient/full_norm" in entry for entry in one["history"]) == ("probe" in case)
    for alone, shared in zip(one["history"], two["history"], strict=True):
        assert alone.keys() == shared.keys()
        # Not TRL's entropy and clip ratios: those are means of means over micro-batches.
        names = {name for name in alone if name.startswith("token_weights/")}
        for name in names | {"loss", "grad_norm"}:
            assert close(float(alone[name]), float(shared[name])), (case, name)
        # A probe's differences of float32 losses round more.
        for name in alone:
            if name.startswith("gradient/"):
                assert shared[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-4), name
    pairs = zip(one["parameters"], two["parameters"], strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 1e-5, case
    for alone, shared in zip(one["rollouts"], two["rollouts"], strict=True):
        same_rollout(case, alone, shared)
    # Not one weight for all: halfway through its schedule, low2high has that.
    assert any(len({w for row in rows for w in row["weights"]}) > 1 for rows in one["rollouts"])
    if two["source"] != "none":
        # The ranks' own extrema differ, so weights made from those would not agree.
        low, high = zip(*two["extrema"], strict=True)
        assert low[0] != low[1] and high[0] != high[1]


def same_rollout(case: str, one: list[dict], two: list[dict]) -> None:
    """The same weights, whatever the split; prompts are numbered as they are."""
    assert len(one) == len(two) and {row["rank"] for row in two} == {0, 1}
    # A rank pads to its own longest prompt, which rounds attention entropies in their last bits.
    # Rescaled to their narrow range, that is a few millionths. A selection stays what it is.
    rescaled = 1e-5 if case in RESCALED else 0.0
    largest = max(abs(product) for row in one for product in row["products"])
    most = {"weights": rescaled, "products": rescaled * max(1.0, largest)}
    for alone, shared in zip(one, two, strict=True):
        assert alone["tokens"] == shared["tokens"] and alone["prompt"] == shared["prompt"]
        for name in ("weights", "products"):
            pairs = zip(alone[name], shared[name], strict=True)
            assert max(abs(a - b) for a, b in pairs) <= most[name], (case, name)
    for rows in (one, two):
        numbers = {(tuple(row["prompt"]), row["prompt_id"]) for row in rows}
        assert len(numbers) == len({number for _, number in numbers}) == len(rows) // GENERATIONS
    spans = {row["prompt_id"] for row in two if row["rank"] == 0} & {
        row["prompt_id"] for row in two if row["rank"] == 1
    }
    assert bool(spans) == (case == "a prompt on both ranks")
