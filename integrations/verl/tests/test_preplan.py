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
    """Places of the highest 40%, rounded up; of equal ones the later. None if rounding decides."""
    order = sorted(range(len(values)), key=lambda place: (values[place], place))
    limit = len(order) - math.ceil(2 * len(order) / 5)
    gap = values[order[limit]] - values[order[limit - 1]] if limit else 1.0
    return None if 0 < gap < ROUNDING else {*order[limit:]}


def chosen(maps, first):
    """Preplan tokens and anchors of a response that begins at `first`; None if rounding decides."""
    local, distant = (
        torch.stack(
            [maps[layer][0, getattr(own, kind), :].mean(0) for layer, own in CLASSES.items()]
        ).mean(0)
        for kind in ("local", "distant")
    )
    tokens = range(first, len(local))
    far = [sum(float(local[t, s]) * min(t - s, BOUND) for s in range(t + 1)) for t in tokens]
    influence = []
    for s in tokens:
        seen = [float(distant[t, s]) for t in range(s + FIRST, min(len(local) - 1, s + LAST) + 1)]
        influence.append(sum(seen) / len(seen) if seen else 0.0)
    change = [abs(one - other) for one, other in itertools.pairwise(far)] + [0.0]
    sets = top(change), top(influence)
    return None if None in sets else sets[0] | sets[1]


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
    told = undecided = 0
    for step in range(1, STEPS + 1):
        rows = torch.load(folder / f"rollout{step}_0.pt", weights_only=False)
        model, weights = policy(folder, step), []
        assert len(rows["keys"]) == PROMPTS * SAMPLES
        for place, (prompt, response) in enumerate(
            zip(rows["prompts"], rows["responses"], strict=True)
        ):
            plain, found = rows["plain"][place].double(), rows["advantages"][place].double()
            expected = torch.ones(len(response), dtype=torch.float64)
            if plain[0] > 0:
                with torch.no_grad():
                    output = model(torch.cat([prompt, response])[None], output_attentions=True)
                places = chosen(output.attentions, len(prompt))
                if places is None:
                    undecided += 1
                    continue
                expected[sorted(places)] = 1.5
            weights.append(expected)
            if plain[0]:
                torch.testing.assert_close(found / plain, expected, atol=1e-5, rtol=0)
                told += int(plain[0] > 0)
            else:
                assert not found.any()
        if len(weights) == len(rows["keys"]):
            mean = float(torch.cat(weights).mean())
            assert metrics[step]["token_weights/weight_mean"] == pytest.approx(mean, abs=1e-5)
    assert told > 2 * STEPS and undecided <= told / 20


def test_the_policy_that_is_read_moves(trained):
    folder, _ = trained
    first, last = (policy(folder, step).state_dict() for step in (1, STEPS))
    assert max(float((first[name] - last[name]).abs().max()) for name in first) > 1e-4
