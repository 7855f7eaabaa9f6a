"""The preplan-and-anchor recipe in TRL: every step's weights are those of eager attention maps."""

import itertools
import math

import pytest
import tiny
import tokenweights as tw
import torch
from tokenweights import HeadClasses

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer

STEPS = 2  # ten were run by hand
FIRST, LAST, BOUND = 1, 4, 3
CLASSES = {1: HeadClasses((0,), (1,)), 3: HeadClasses((1,), (0,))}


def recipe(name="preplan_anchor40"):
    made = {"name": name, "first": FIRST, "last": LAST, "bound": BOUND}
    return tw.with_head_classes(tw.recipe(made), CLASSES)


def top(values):
    """Places of the highest 40%, rounded up; of equal ones the later."""
    order = sorted(range(len(values)), key=lambda place: (values[place], place))
    return order[len(order) - math.ceil(2 * len(order) / 5) :]


def expected_weights(local, distant, start, advantage):
    """The rule on one sequence, whose response begins at `start`, from mean maps of two classes."""
    tokens = range(start, len(local))
    far = [sum(float(local[t, s]) * min(t - s, BOUND) for s in range(t + 1)) for t in tokens]
    influence = []
    for s in tokens:
        later = range(s + FIRST, min(len(local) - 1, s + LAST) + 1)
        seen = [float(distant[t, s]) for t in later]
        influence.append(sum(seen) / len(seen) if seen else 0.0)
    change = [abs(a - b) for a, b in itertools.pairwise(far)] + [0.0]
    chosen = {*top(change), *top(influence)}
    return [1.5 if place in chosen and advantage > 0 else 1.0 for place in range(len(tokens))]


class Compared(TokenWeightsGRPOTrainer):
    compared = ()

    def _weighted(self, output, columns):
        ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
        real = torch.cat([output["prompt_mask"], output["completion_mask"]], 1).bool()
        eager = tiny.policy(attn_implementation="eager")
        eager.load_state_dict(self.model.state_dict())
        with torch.no_grad():
            maps = eager(ids, attention_mask=real, output_attentions=True).attentions
        plain, expected = output["advantages"].clone(), []
        for row, own in enumerate(real):
            local, distant = (
                torch.stack(
                    [
                        maps[layer][row, getattr(classes, kind)].double().mean(0)
                        for layer, classes in CLASSES.items()
                    ]
                ).mean(0)[own][:, own]
                for kind in ("local", "distant")
            )
            start = int(output["prompt_mask"][row].sum())
            expected.append(expected_weights(local, distant, start, float(plain[row])))
        weighted = super()._weighted(output, columns)
        for row, wanted in enumerate(expected):
            mask = output["completion_mask"][row].bool()
            found = weighted["advantages"][row][mask]
            self.compared += ((found, torch.tensor(wanted) * plain[row]),)
        return weighted


@pytest.mark.parametrize("generations", ["scoring_pass", "old_log_prob_pass"])
def test_weights_are_those_of_eager_maps(tmp_path, generations):
    steps = {"steps_per_generation": 4} if generations == "old_log_prob_pass" else {}
    trainer = tiny.trainer(
        Compared, TokenWeightsGRPOConfig, tmp_path, recipe=recipe(), max_steps=STEPS, **steps
    )
    trainer.train()
    assert trainer.score_source == generations
    weighted = [pair for pair in trainer.compared if not torch.equal(pair[0], pair[0] * 0)]
    assert len(trainer.compared) >= 8 and weighted
    for found, wanted in trainer.compared:
        torch.testing.assert_close(found, wanted.float(), atol=1e-5, rtol=1e-5)
    shares = [len(found.unique()) for found, wanted in weighted if float(wanted.max()) > 0]
    assert 2 in shares, "nothing was weighed"
