"""The preplan-and-anchor recipe in VeRL: every step's weights are those of eager attention maps."""

import itertools
import json
import math

import pytest
import tokenweights as tw
import torch
from test_async import policy
from test_trainer import run
from tokenweights import HeadClasses

STEPS, PROMPTS, SAMPLES = 10, 4, 4
FIRST, LAST, BOUND = 1, 4, 3
CLASSES = {1: HeadClasses((0,), (1,)), 2: HeadClasses((1,), (0,))}
ACTOR = "actor_rollout_ref.actor"
SETTINGS = (
    "trainer.v1.trainer_mode=recording_sync",
    f"data.train_batch_size={PROMPTS}",
    f"{ACTOR}.ppo_mini_batch_size={PROMPTS}",
    f"actor_rollout_ref.rollout.n={SAMPLES}",
    f"{ACTOR}.checkpoint.save_contents=[model,hf_model]",
    "trainer.save_freq=1",
)
# What float32 does to a score; where the scores on both sides of a limit are nearer, none is right.
ROUNDING = 1e-5


def top(values):
    """Places surely among the highest 40% (rounded up; of equal ones the later), and possibly."""
    order = sorted(range(len(values)), key=lambda place: (values[place], place))
    limit = len(order) - math.ceil(2 * len(order) / 5)
    low, high = (values[order[place]] for place in (max(limit - 1, 0), limit))
    if not 0 < high - low < ROUNDING:
        return {*order[limit:]}, {*order[limit:]}
    places = range(len(values))
    return (
        {place for place in places if values[place] >= low + ROUNDING},
        {place for place in places if values[place] > high - ROUNDING},
    )


def chosen(maps, first):
    """Places surely and possibly chosen in a response that begins at `first`."""
    local, distant = (
        torch.stack(
            [maps[layer][0, getattr(own, kind), :].mean(0) for layer, own in CLASSES.items()]
        )
        .mean(0)
        .tolist()
        for kind in ("local", "distant")
    )
    tokens = range(first, len(local))
    far = [sum(local[t][s] * min(t - s, BOUND) for s in range(t + 1)) for t in tokens]
    influence = []
    for s in tokens:
        seen = [distant[t][s] for t in range(s + FIRST, min(len(local) - 1, s + LAST) + 1)]
        influence.append(sum(seen) / len(seen) if seen else 0.0)
    change = [abs(one - other) for one, other in itertools.pairwise(far)] + [0.0]
    return (set.union(*both) for both in zip(top(change), top(influence), strict=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of the run and its metrics."""
    folder = tmp_path_factory.mktemp("preplan")
    changes = {"name": "preplan_anchor40", "first": FIRST, "last": LAST, "bound": BOUND}
    made = tw.with_head_classes(tw.recipe(changes), CLASSES)
    recipe = "token_weights.recipe=" + json.dumps(made.to_dict()).replace('"', "")
    modules = "cpu_platform,recording"
    return folder, run(folder, STEPS, 1, *SETTINGS, recipe=recipe, modules=modules)


def test_weights_at_every_step_are_those_of_eager_maps(trained):
    folder, metrics = trained
    told = decided = undecided = 0
    for step in range(1, STEPS + 1):
        rows = torch.load(folder / f"rollout{step}_0.pt", weights_only=False)
        model, weights = policy(folder, step), []
        assert len(rows["keys"]) == PROMPTS * SAMPLES
        for place, (prompt, response) in enumerate(
            zip(rows["prompts"], rows["responses"], strict=True)
        ):
            plain, found = rows["plain"][place].double(), rows["advantages"][place].double()
            weights.append(torch.ones(len(response), dtype=torch.float64))
            if not plain[0]:
                assert not found.any()
                continue
            if plain[0] > 0:
                with torch.no_grad():
                    output = model(torch.cat([prompt, response])[None], output_attentions=True)
                surely, possibly = chosen(output.attentions, len(prompt))
                heavy = {*(found / plain > 1.25).nonzero().flatten().tolist()}
                assert surely <= heavy <= possibly
                weights[-1][sorted(heavy)] = 1.5
                told += 1
                decided += len(response) - len(possibly - surely)
                undecided += len(possibly - surely)
            torch.testing.assert_close(found / plain, weights[-1], atol=1e-5, rtol=0)
        mean = float(torch.cat(weights).mean())
        assert metrics[step]["token_weights/weight_mean"] == pytest.approx(mean, abs=1e-5)
    assert told > 2 * STEPS and undecided <= decided / 20


def test_the_policy_that_is_read_moves(trained):
    folder, _ = trained
    first, last = (policy(folder, step).state_dict() for step in (1, STEPS))
    assert max(float((first[name] - last[name]).abs().max()) for name in first) > 1e-4
