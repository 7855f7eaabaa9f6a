"""A recipe in words and equations."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenweights.recipes.record import Recipe


def recipe_description(made: "Recipe") -> str:
    """A recipe as a few lines of text, with the equations it stands for."""
    lines = [f"recipe   {made.name}"]
    if made.signal == "attention_entropy":
        layers = "middle" if made.layers is None else ", ".join(map(str, made.layers))
        kinds = {
            "raw": "H = -sum a log a  (Eq. 12)",
            "normalized": "H = -sum a log a / log N  (Eq. 13)",
            "topk": f"H over the {made.top_k} largest a, renormalized  (Eq. 14)",
            "fixed": f"H over the first {made.fixed_k} positions, renormalized  (Eq. 15)",
        }
        lines.append(f"signal   attention entropy, {kinds[made.entropy_kind]}")
        lines.append(f"         layer {layers}, {made.alignment} row of each token")
    elif made.signal == "predictive_entropy":
        lines.append("signal   predictive entropy, H = -sum p log p  (Eq. 19)")
    elif made.signal == "loss_magnitude":
        lines.append("signal   loss magnitude, |l|  (Eq. 23)")
    share = f"{made.fraction:.0%} of each response"
    rules = {
        "uniform": "w = 1 for every token  (Eq. 1)",
        "bottom": f"w = 1 for the lowest {share}, else 0  (Eq. 16)",
        "top": f"w = 1 for the highest {share}, else 0  (Eq. 16)",
        "front": f"w = 1 for the first {share}, else 0  (Eq. 18)",
        "back": f"w = 1 for the last {share}, else 0  (Eq. 18)",
        "random": f"w = 1 for a random {share}, else 0",
        "bernoulli": f"w = 1 with probability {made.fraction:g}, else 0",
        "type_matched": f"w = 1 for random tokens of the types of the {made.matched_to} {share}",
        "position_matched": f"w = 1 for random tokens placed as the {made.matched_to} {share}",
        "endpoints": "w = (1 - abar) w_low + abar w_high  (Eq. 28)",
    }
    lines.append(f"rule     {rules[made.rule]}")
    if made.rule == "endpoints":
        lines.append(
            f"         abar = softmax(H / {made.temperature:g}) rescaled to [0, 1] "
            f"over the rollout batch, {made.form} form  (Eq. 26, 27)"
        )
        if made.schedule == "constant":
            lines.append(f"schedule w_low = {made.low[0]:g}, w_high = {made.high[0]:g}")
        else:
            lines.append(
                f"schedule w_low {made.low[0]:g} -> {made.low[1]:g}, "
                f"w_high {made.high[0]:g} -> {made.high[1]:g}, "
                f"{made.schedule}, {made.warmup_steps} steps  (Eq. 29, 30)"
            )
    if made.match_mass:
        lines.append("mass     weights rescaled to mean 1 in every rollout batch")
    means = {
        "all_tokens": "sum w l / T, all valid tokens  (Eq. 7, 25)",
        "selected_tokens": "sum w l / K, selected tokens  (Eq. 24)",
        "weight_sum": "sum w l / sum w  (Eq. 3, 17)",
    }
    lines.append(f"loss     {means[made.denominator]}")
    return "\n".join(lines)
