"""The paper's formulas, written down again: plain transformers, eager attention, float64.

Nothing of the library, of the adapter or of a trainer is used here.
"""

import itertools
import math

import torch
from transformers import AutoModelForCausalLM

PROBE = 1  # the middle layer of three
SAMPLES = 4


def token_places(response):
    """Positions of the tokens that the policy wrote."""
    return [place for start, end in response["action_ranges"] for place in range(start, end)]


def load(policy):
    return AutoModelForCausalLM.from_pretrained(
        policy, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def attention_entropies(attention, places, row):
    """Normalized entropy of the head average: of the row that decides a token, or of its own."""
    entropies = []
    for place in places:
        query = place - 1 if row == "deciding" else place
        shares = attention[:, query, : query + 1].mean(0)
        entropy = -(shares * shares.log()).nan_to_num().sum()
        entropies.append(float(entropy) / math.log(query + 1) if query else 0.0)
    return entropies


def backward_distances(attention, places, bound=10):
    """How far back each token looks, a pair counting with at most the bound; heads averaged."""
    return [
        sum(float(a) * min(t - s, bound) for s, a in enumerate(attention[:, t, : t + 1].mean(0)))
        for t in places
    ]


def future_influences(attention, places, first=10, last=50):
    """What each token gets on average from the queries at these distances; heads averaged."""
    mean, found = attention.mean(0), []
    for s in places:
        later = range(s + first, min(len(mean) - 1, s + last) + 1)
        found.append(sum(float(mean[t, s]) for t in later) / max(len(later), 1))
    return found


def preplan_and_anchor(far, influence):
    """1.5 for the top 40%, rounded up, of changes of distance and of influence; else 1."""
    change = [abs(a - b) for a, b in itertools.pairwise(far)] + [0.0]
    chosen = set()
    for values in (change, influence):
        order = sorted(range(len(values)), key=lambda place: (values[place], place))
        chosen |= {*order[len(order) - math.ceil(2 * len(order) / 5) :]}
    return [1.5 if place in chosen else 1.0 for place in range(len(far))]


def read(policy, responses, *, row="deciding", temperature=1.0, layer=PROBE, state=None):
    """Log-probabilities (with gradient), attention and predictive entropies of every response.

    Of the saved policy, or of one with these parameters.
    """
    model, found = load(policy), []
    if state is not None:
        missing, _ = model.load_state_dict(state, strict=False)
        assert set(missing) <= {"lm_head.weight"}, "tied"
    for response in responses:
        places = token_places(response)
        ids = torch.tensor([response["observation_tokens"]])
        output = model(ids, output_attentions=True)
        every = (output.logits[0] / temperature).log_softmax(-1)
        deciding = every[[place - 1 for place in places]]
        found.append(
            {
                "log_probs": deciding.gather(1, ids[0, places][:, None])[:, 0],
                "attention": attention_entropies(output.attentions[layer][0].detach(), places, row),
                "maps": [maps[0].detach() for maps in output.attentions],
                "predictive": (-(deciding.exp() * deciding).sum(-1)).tolist(),
            }
        )
    return model, found


def group_advantages(responses):
    rewards = torch.tensor([response["reward"] for response in responses], dtype=torch.float64)
    grouped = rewards.view(-1, SAMPLES)
    return ((grouped - grouped.mean(1, True)) / (grouped.std(1, keepdim=True) + 1e-9)).flatten()


def soft_weights(entropies, *, low, high, temperature=1.0):
    """Eq. 26-28 without epsilon, over the whole batch."""
    top = max(max(row) for row in entropies)
    bottom = min(min(row) for row in entropies)
    rows = []
    for row in entropies:
        shares = [
            (math.exp((value - bottom) / temperature) - 1)
            / (math.exp((top - bottom) / temperature) - 1)
            for value in row
        ]
        rows.append([(1 - share) * low + share * high for share in shares])
    return rows


def lowest_fifth(entropies):
    rows = []
    for row in entropies:
        count = math.ceil(len(row) / 5)
        chosen = sorted(range(len(row)), key=lambda place: (row[place], place))[:count]
        rows.append([float(place in chosen) for place in range(len(row))])
    return rows


def gradient(model, found, responses, weights, *, denominator="all_tokens"):
    """Gradient of minus the weighted mean of advantage times log-probability, at ratio 1."""
    total = sum(len(row) for row in weights)
    if denominator == "selected_tokens":
        total = sum(weight > 0 for row in weights for weight in row)
    elif denominator == "weight_sum":
        total = sum(weight for row in weights for weight in row)
    loss = 0
    for signals, advantage, row in zip(found, group_advantages(responses), weights, strict=True):
        loss = loss - advantage * (torch.tensor(row).double() * signals["log_probs"]).sum()
    (loss / total).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = math.sqrt(sum(float(value.pow(2).sum()) for value in gradients.values()))
    return gradients, norm


def steps_taken(before, after):
    return {name: before[name].double() - after[name].double() for name in after}


def largest_difference(first, second):
    shared = first.keys() & second.keys()
    assert shared, "nothing to compare"
    return max(float((first[name] - second[name]).abs().max()) for name in shared)
