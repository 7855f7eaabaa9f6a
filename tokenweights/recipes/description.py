"""A recipe in words and equations."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenweights.recipes.record import Recipe


def recipe_description(made: "Recipe") -> str:
    """A recipe as a few lines of text, with the equations it stands for."""
    lines = [f"recipe   {made.name}", *_signal(made), *_rule(made)]
    if made.match_mass:
        lines.append("mass     weights rescaled to mean 1 in every rollout batch")
    means = {
        "all_tokens": "sum w l / T, all valid tokens  (Eq. 7, 25)",
        "selected_tokens": "sum w l / K, selected tokens  (Eq. 24)",
        "weight_sum": "sum w l / sum w  (Eq. 3, 17)",
    }
    return "\n".join([*lines, f"loss     {means[made.denominator]}"])


def _signal(made: "Recipe") -> list[str]:
    if made.signal == "predictive_entropy":
        return ["signal   predictive entropy, H = -sum p log p  (Eq. 19)"]
    if made.signal == "loss_magnitude":
        return ["signal   loss magnitude, |l|  (Eq. 23)"]
    if made.signal == "none":
        return []
    kinds = {
        "raw": "H = -sum a log a  (Eq. 12)",
        "normalized": "H = -sum a log a / log N  (Eq. 13)",
        "topk": f"H over the {made.top_k} largest a, renormalized  (Eq. 14)",
        "fixed": f"H over the first {made.fixed_k} positions, renormalized  (Eq. 15)",
    }
    layers = "middle" if made.layers is None else ", ".join(map(str, made.layers))
    lines = [
        f"signal   attention entropy, {kinds[made.entropy_kind]}",
        f"         layer {layers}, {made.alignment} row of each token",
    ]
    if made.layer_reduction == "rank_mean":
        lines.append("         mean over layers of the rank within the response, in [0, 1]")
    elif made.layers is not None and len(made.layers) > 1:
        lines.append("         mean over layers")
    return lines


def _rule(made: "Recipe") -> list[str]:
    share = f"{_decimal(100 * made.fraction)}% of each response"
    seed = f"seed {made.seed}"
    drawn = f"w = 1 for random tokens, else 0; {seed}"
    matched = f"as the {made.matched_to} {share} has"
    rules = {
        "uniform": "w = 1 for every token  (Eq. 1)",
        "bottom": f"w = 1 for the lowest {share}, else 0  (Eq. 16)",
        "top": f"w = 1 for the highest {share}, else 0  (Eq. 16)",
        "front": f"w = 1 for the first {share}, else 0  (Eq. 18)",
        "back": f"w = 1 for the last {share}, else 0  (Eq. 18)",
        "random": f"w = 1 for a random {share}, else 0; {seed}",
        "bernoulli": f"w = 1 with probability {_decimal(made.fraction)}, else 0; {seed}",
        "type_matched": f"{drawn}\n         as many of each type {matched}",
        "position_matched": (
            f"{drawn}\n         as many in each of {made.position_bins} position bins {matched}"
        ),
        "endpoints": "w = (1 - abar) w_low + abar w_high  (Eq. 28)",
    }
    lines = [f"rule     {rules[made.rule]}"]
    if made.rule == "endpoints":
        eps = f", eps {_decimal(made.eps)}" if made.form == "literal" else ""
        lines.append(
            f"         abar = softmax(H / {_decimal(made.temperature)}) rescaled to [0, 1] "
            f"over the rollout batch, {made.form} form{eps}  (Eq. 26, 27)"
        )
        lines.append(f"schedule {_schedule(made)}")
    return lines


def _schedule(made: "Recipe") -> str:
    (low, last_low), (high, last_high) = (map(_decimal, pair) for pair in (made.low, made.high))
    if made.schedule == "constant":
        return f"w_low = {low}, w_high = {high}"
    shapes = {
        "linear": f"linear, {made.warmup_steps} steps  (Eq. 29, 30)",
        "cosine": f"half a cosine, {made.warmup_steps} steps",
        "step": f"a jump at step {made.warmup_steps}",
    }
    ends = f"w_low {low} -> {last_low}, w_high {high} -> {last_high}"
    return f"{ends}, {shapes[made.schedule]}"


def _decimal(value: float) -> str:
    """A number as it was written: 15 digits, which every decimal of that length survives."""
    return f"{value:.15g}"
