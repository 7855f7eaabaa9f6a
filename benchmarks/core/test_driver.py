"""What a trainer's driver computes once per rollout batch, while its accelerators wait.

4096 responses of up to 8192 tokens: sample ids, weights, metrics and records, in seconds of one
thread and in units of one `torch.sort` of the scores.
"""

import dataclasses
import tempfile
import time

import pytest
import torch

import tokenweights as tw
from tokenweights.recipes import Recipe, RolloutBatch
from tokenweights.recipes.identity import text_numbers
from tokenweights.report.rollouts import RolloutRecords

RESPONSES, TOKENS, SAMPLES = 4096, 8192, 8
STEP = 30


def batch():
    """Responses of half to full length; the columns share memory where a rule does not care."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(RESPONSES, TOKENS, generator=generator)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (RESPONSES,), generator=generator)
    return RolloutBatch(
        mask=torch.arange(TOKENS) < lengths[:, None],
        prompt_ids=torch.arange(RESPONSES) // SAMPLES,
        token_ids=torch.randint(150_000, scores.shape, generator=generator, dtype=torch.int32),
        advantages=torch.randn(RESPONSES, 1, generator=generator).expand_as(scores),
        log_probs=-scores,
        predictive_entropy=scores,
        attention={0: scores},
    )


def seconds(function, *arguments, **options):
    start = time.process_time()
    result = function(*arguments, **options)
    return result, time.process_time() - start


def sorted_groups(scores, mask):
    """Anchors and explorers from one full sort."""
    ranks, lengths = tw.masked_ranks(scores, mask), mask.sum(-1, keepdim=True)
    count = -(-lengths // 5)
    return mask & (ranks < count), mask & (ranks >= lengths - count)


def agree(metrics, made, mask, scores):
    """Raises unless the metrics are those of formulas written plainly, in float64."""
    wide, weights = scores.double(), made.double()
    total = weights[mask].sum()
    for name, group in zip(("anchor", "explorer"), sorted_groups(scores, mask), strict=True):
        inside = wide[group]
        expected = {
            f"{name}_share": weights[group].sum() / total,
            f"{name}_entropy_mean": inside.mean(),
            f"{name}_entropy_std": inside.std(correction=0),
        }
        for key, value in expected.items():
            torch.testing.assert_close(metrics[key], float(value), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["low2high", "anchor20", "random20"])
def test_driver(benchmark, name):
    rows, recipe = batch(), tw.recipe(name).placed(1)
    scores, mask = rows.attention[0], rows.mask
    _, sort = seconds(torch.sort, scores)
    responses = [row[own] for row, own in zip(rows.token_ids, mask, strict=True)]
    parts = {}
    prompts = [torch.arange(500)] * RESPONSES
    ids, parts["sample ids"] = seconds(text_numbers, STEP, prompts, responses)
    rows = dataclasses.replace(rows, sample_ids=ids)
    made, whole = seconds(recipe.weighted, rows, step=STEP)
    used = scores if recipe.signal is not None else None
    metrics, parts["metrics"] = seconds(tw.token_weight_metrics, used, made.weights, mask)
    parts["weights"] = whole - parts["metrics"]
    assert all(made.metrics[key] == value for key, value in metrics.items())
    if used is not None:
        agree(metrics, made.weights, mask, scores)
    if recipe.attention is not None:
        with tempfile.TemporaryDirectory() as folder:
            records = RolloutRecords(f"{folder}/tokens.jsonl", every=100)
            text = {"prompt": str, "decode": str}
            _, parts["records"] = seconds(records.append, recipe, rows, made, step=STEP, **text)
    print(f"\n{name}: one sort of the scores takes {sort:.2f} s")
    for part, spent in {**parts, "together": sum(parts.values())}.items():
        benchmark.extra_info[part] = [round(spent, 2), round(spent / sort, 2)]
        print(f"  {part}: {spent:.2f} s, {spent / sort:.2f} sorts")
    benchmark.pedantic(Recipe.weighted, args=(recipe, rows), kwargs={"step": STEP}, rounds=1)
