"""A probe sees the gradients that plain torch sees, on VeRL's own worker, and leaves no trace."""

from functools import cache

import pytest
import tokenweights as tw
import torch
from batches import LAYERS, plain_advantages, rows
from ranks import results_by_case
from tokenweights_lab import load_policy
from torch.nn.utils.rnn import pad_sequence

RUNS = {
    "one": (1, ["fsdp", "fsdp2", "padded", "bfloat16", "fused"]),
    "two": (2, ["fsdp", "fsdp2", "lora"]),
    "slices": (2, ["ulysses"]),
}
EVERY_CASE = [(run, case) for run, (_, cases) in RUNS.items() for case in cases]
SUBSETS = ("anchor", "explorer", "random")


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    return results_by_case("probe_run.py", RUNS, tmp_path_factory.mktemp)


@cache
def expected_metrics():
    """Eq. 4-6 from gradients of one group after another, in float64, row by row, without VeRL."""
    model = load_policy(attn_implementation="eager").double()
    losses, scores = [], []
    for (prompt, response), advantages in zip(rows(), plain_advantages(), strict=True):
        ids, first = torch.tensor([prompt + response]), len(prompt) - 1
        output = model(ids, output_attentions=True)
        log_probs = output.logits[0, first:-1].log_softmax(-1)
        log_probs = log_probs.gather(1, torch.tensor(response)[:, None])[:, 0]
        losses.append(-advantages * (log_probs - log_probs.detach()).exp())
        entropies = []
        for layer in LAYERS:
            mean = output.attentions[layer][0].detach().mean(0)
            entropy = -torch.special.xlogy(mean, mean).sum(-1)
            visible = torch.arange(1, len(entropy) + 1).double()
            entropies.append((entropy / visible.log())[first:-1])
        scores.append(torch.stack(entropies).mean(0))
    loss, score = (pad_sequence(part, batch_first=True) for part in (losses, scores))
    mask = pad_sequence(
        [torch.ones(len(part), dtype=torch.bool) for part in losses], batch_first=True
    )
    parameters = list(model.parameters())

    def gradient(members):
        total = (loss * members).sum() / mask.sum()
        found = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([part.flatten() for part in found if part is not None])

    deciles, full = tw.quantile_bins(score, mask, bins=10), gradient(mask)
    metrics = {"gradient/full_norm": float(full.norm())}
    for number in range(10):
        part = gradient(mask & (deciles == number))
        metrics[f"gradient/decile_{number}"] = float(part @ full / full.square().sum())
    ids = torch.arange(len(mask))
    subsets = [
        tw.bottom_fraction(score, mask),
        tw.top_fraction(score, mask),
        tw.random_fraction(mask, fraction=0.2, seed=0, sample_ids=ids),
    ]
    for name, members in zip(SUBSETS, subsets, strict=True):
        part = gradient(members)
        cosine = part @ full / (part.norm() * full.norm())
        metrics[f"gradient/{name}_norm_ratio"] = float(part.norm() / full.norm())
        metrics[f"gradient/{name}_cosine"] = float(cosine)
        metrics[f"gradient/{name}_projection_ratio"] = float(cosine * part.norm() / full.norm())
    return metrics


@pytest.mark.parametrize(("run", "case"), EVERY_CASE)
def test_the_metrics_are_those_of_plain_torch(results, run, case):
    # In bfloat16 the reference stays in float32, so that what is allowed is the rounding.
    allowed = 0.03 if case == "bfloat16" else 1e-3
    for result in results(run, case):
        found = result["metrics"]
        if case != "lora":  # plain torch has no adapters
            expected = expected_metrics()
            assert {name: found[name] for name in expected} == pytest.approx(expected, abs=allowed)
        total = sum(found[f"gradient/decile_{n}"] for n in range(10))
        assert total == pytest.approx(1, abs=allowed)


@pytest.mark.parametrize(("run", "case"), EVERY_CASE)
def test_training_is_bitwise_the_same_with_and_without(results, run, case):
    for result in results(run, case):
        assert result["tensors"] > 3 and result["moved"]
        assert result["same"] and result["gradients_kept"]


@pytest.mark.parametrize(("run", "case"), EVERY_CASE)
def test_ranks_agree_and_cosines_disperse(results, run, case):
    first, *others = results(run, case)
    assert all(other["series"] == first["series"] for other in others)
    cosines = [metrics["gradient/anchor_cosine"] for metrics in first["series"]]
    assert cosines[0] != cosines[1]
    spread = torch.tensor(cosines[:2]).std(correction=0)
    assert first["series"][1]["gradient/anchor_cosine_std"] == pytest.approx(
        float(spread), rel=1e-3
    )
