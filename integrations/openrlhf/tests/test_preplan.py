"""The preplan-and-anchor recipe in OpenRLHF: every step's weights are those of eager maps."""

import pytest
import ray
import reference
import tiny
import tokenweights as tw
import torch
from tokenweights import HeadClasses

STEPS = 10
FIRST, LAST, BOUND = 1, 4, 3
CLASSES = {0: HeadClasses((0,), (1,)), 2: HeadClasses((1,), (0,))}


def keeping(kept):
    """A trainer that notes each step's policy, and advantages before and after weighting."""

    class Keeping(tiny.WeightedTrainer):
        def train_step(self, rollouts, step):
            maker, made = self.experience_maker, self.experience_maker._rollout_batch

            def rollout_batch(rows, order):
                batch = made(rows, order)
                # Asked again after the step, the rows are those that it trained with.
                self.seen = batch.mask, batch.advantages.clone(), lambda: rows("advantages")
                return batch

            maker._rollout_batch = rollout_batch
            actor = self.actor_model_group._actor_handlers[0]
            state = ray.get(actor.__ray_call__.remote(tiny.parameters))
            found = super().train_step(rollouts, step)
            maker._rollout_batch = made
            mask, plain, trained = self.seen
            kept.append((state, mask, plain, trained()))
            return found

    return Keeping


def expected_weights(found, responses, advantages):
    """The rule from attention maps, for each response."""
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
        yield credited if advantage > 0 else [1.0] * len(places)


@pytest.mark.parametrize("options", [(), ("--ds.packing_samples",)], ids=["padded", "packed"])
def test_weights_at_every_step_are_those_of_eager_maps(actors, policy, options):
    changes = {"name": "preplan_anchor40", "first": FIRST, "last": LAST, "bound": BOUND}
    made = tw.with_head_classes(tw.recipe(changes), CLASSES)
    # A tenth of the gradient at every step: the policy moves, and stays finite.
    rate = ("--actor.adam.lr", "1e5")
    args = tiny.arguments(policy, *rate, *options, recipe=made.to_dict())
    kept, compared = [], 0
    statuses, _ = tiny.trained(actors, args, steps=STEPS, trainer_class=keeping(kept))
    assert len(statuses) == len(kept) == STEPS
    for step, (state, mask, plain, trained) in enumerate(kept):
        responses = list(tiny.responses(step))
        model, found = reference.read(policy, responses, state=state)
        advantages = reference.group_advantages(responses).tolist()
        weights = list(expected_weights(found, responses, advantages))
        for row, wanted in enumerate(weights):
            before, after = (values[row][mask[row]].double() for values in (plain, trained))
            told = before.abs() > 1e-3  # an advantage of 0 says nothing of its weight
            wanted = torch.tensor(wanted).double()[told]
            torch.testing.assert_close(after[told] / before[told], wanted, atol=1e-5, rtol=0)
            compared += len(wanted)
        _, norm = reference.gradient(model, found, responses, weights)
        assert statuses[step]["actor_grad_norm"] == pytest.approx(norm, rel=1e-4, abs=1e-6)
        mean = sum(sum(row) for row in weights) / sum(len(row) for row in weights)
        assert 1 < mean < 1.5
        assert statuses[step]["token_weights/weight_mean"] == pytest.approx(mean, abs=1e-5)
    assert compared > 60 * STEPS
    assert reference.largest_difference(kept[0][0], kept[-1][0]) > 1e-2
