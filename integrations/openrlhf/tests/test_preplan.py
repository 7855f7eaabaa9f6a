"""The preplan-and-anchor recipe in OpenRLHF: its step is that of weights from eager maps."""

import pytest
import reference
import tiny
import tokenweights as tw
import torch
from tokenweights import HeadClasses

STEPS = 2  # ten were run by hand
FIRST, LAST, BOUND = 1, 4, 3
CLASSES = {0: HeadClasses((0,), (1,)), 2: HeadClasses((1,), (0,))}


@pytest.mark.parametrize("options", [(), ("--ds.packing_samples",)], ids=["padded", "packed"])
def test_the_first_step_is_that_of_weights_from_eager_maps(actors, policy, options):
    changes = {"name": "preplan_anchor40", "first": FIRST, "last": LAST, "bound": BOUND}
    made = tw.with_head_classes(tw.recipe(changes), CLASSES)
    args = tiny.arguments(policy, *options, recipe=made.to_dict())
    statuses, _ = tiny.trained(actors, args, steps=STEPS)
    responses = list(tiny.responses())
    model, found = reference.read(policy, responses)
    advantages, weights = reference.group_advantages(responses).tolist(), []
    for response, signals, advantage in zip(responses, found, advantages, strict=True):
        places = reference.token_places(response)
        local, distant = (
            torch.stack(
                [signals["maps"][n][getattr(own, kind), :].mean(0) for n, own in CLASSES.items()]
            ).mean(0, keepdim=True)
            for kind in ("local", "distant")
        )
        far = reference.backward_distances(local, places, BOUND)
        influence = reference.future_influences(distant, places, FIRST, LAST)
        credited = reference.preplan_and_anchor(far, influence)
        weights.append(credited if advantage > 0 else [1.0] * len(places))
    assert any(1.5 in row for row in weights)
    _, norm = reference.gradient(model, found, responses, weights)
    assert statuses[0]["actor_grad_norm"] == pytest.approx(norm, rel=1e-4, abs=1e-6)
    mean = sum(sum(row) for row in weights) / sum(len(row) for row in weights)
    assert statuses[0]["token_weights/weight_mean"] == pytest.approx(mean, abs=1e-5)
    assert len(statuses) == STEPS
