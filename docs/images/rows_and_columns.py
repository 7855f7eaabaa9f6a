"""Draws `row.svg` and `column.svg`: where one token looks, and who looks back at one.

The numbers are those of the embedded policy on a problem of its task, answered by itself.

Usage: python docs/images/rows_and_columns.py
"""

from html import escape
from pathlib import Path

import torch
from tokenweights_lab import load_policy, load_tokenizer, problems

import tokenweights as tw

LAYER, BOUND = 2, 10
WIDTH, TOP, TALL = 860, 56, 110  # of the picture, above the bars, of the highest bar
STYLE = """
    .attention { --ink: #24292f; --accent: #4051b5; --other: #8a4f7d; max-width: 100%; height: auto; font: 14px system-ui, sans-serif; color: var(--md-default-fg-color, var(--ink)); }
    @media (prefers-color-scheme: dark) { .attention { --ink: #d0d7de; --accent: #8c9eff; --other: #d3a0c6; } }
    [data-md-color-scheme="default"] .attention { --accent: #4051b5; --other: #8a4f7d; }
    [data-md-color-scheme="slate"] .attention { --accent: #8c9eff; --other: #d3a0c6; }
    .attention text { fill: currentColor; }
    .attention .token { font: 13px ui-monospace, monospace; text-anchor: middle; }
    .attention .prompt { opacity: 0.6; }
    .attention .chosen { fill: var(--accent); font-weight: 700; }
    .attention .mark { fill: none; stroke: var(--accent); stroke-width: 1.5; }
    .attention .bar { fill: var(--other); }
    .attention .line { stroke: currentColor; stroke-opacity: 0.35; }
"""  # noqa: E501


def answered() -> tuple[list[str], int, torch.Tensor]:
    """Tokens of a prompt and its greedy answer, the prompt's length, and the layer's weights."""
    model, tokenizer = load_policy(), load_tokenizer()
    problem = problems("easy", 1, seed=0)[0]
    prompt = torch.tensor([tokenizer(problem.prompt).input_ids])
    whole = model.generate(prompt, do_sample=False, max_new_tokens=40, pad_token_id=0)
    whole = whole[:, :-1]  # without the token that ends it
    with torch.no_grad(), tw.capture_attention(model, [LAYER]) as capture:
        model(whole)
    (found,) = capture.calls[LAYER]
    weights = tw.attention_weights(found.query, found.key, scale=found.scale)[0]
    return [tokenizer.decode([token]) for token in whole[0]], prompt.shape[1], weights


def picture(
    name: str, title: str, note: str, tokens: list[str], prompt: int, chosen: int, bars: list[float]
) -> str:
    """Bars over the tokens of a sequence, one of which is chosen."""
    step, base, highest = WIDTH / len(tokens), TOP + TALL, max(bars)
    parts = [
        f'<svg class="attention" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} '
        f'{base + 48}" width="{WIDTH}" role="img" aria-labelledby="attention-{name}">',
        f'  <title id="attention-{name}">{escape(title)}. {escape(note)}</title>',
        f"  <style>{STYLE}  </style>",
        f'  <text x="0" y="18" font-weight="600">{escape(title)}</text>',
        f'  <text x="0" y="38">{escape(note)}</text>',
        f'  <path class="line" d="M0 {base}H{WIDTH}"/>',
    ]
    for place, (token, share) in enumerate(zip(tokens, bars, strict=True)):
        left, tall = place * step, TALL * share / highest
        shown = escape(token.replace("\n", "\u21b5").replace(" ", "\u00b7"))
        kind = "chosen" if place == chosen else "prompt" if place < prompt else "answer"
        if tall >= 0.5:
            parts.append(
                f'  <rect class="bar" x="{left + 1.5:.1f}" y="{base - tall:.1f}" '
                f'width="{step - 3:.1f}" height="{tall:.1f}"/>'
            )
        middle = left + step / 2
        parts.append(
            f'  <text class="token {kind}" x="{middle:.1f}" y="{base + 18}">{shown}</text>'
        )
    left = chosen * step
    parts += [
        f'  <rect class="mark" x="{left:.1f}" y="{base + 4}" width="{step:.1f}" height="20"/>',
        f'  <text class="prompt" x="0" y="{base + 42}">prompt</text>',
        f'  <text class="prompt" x="{prompt * step:.1f}" y="{base + 42}">answer</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def pictures() -> dict[str, str]:
    """Both pictures by the names of their files.

    Of the token of the answer that looks back farthest, and of the one that gets most on average.
    """
    tokens, prompt, weights = answered()
    size = len(tokens)
    place = torch.arange(size)
    far = (weights * (place[:, None] - place).clamp(max=BOUND)).sum(-1)
    later = (place[:, None] > place) & (place[:, None] >= prompt)
    received = (weights * later).sum(0) / later.sum(0).clamp(min=1)
    # Tokens that have a past and a future in the answer.
    inside = slice(prompt + 3, size - 12)
    looks = int(far[inside].argmax()) + inside.start
    source = int(received[inside].argmax()) + inside.start
    row = weights[looks].tolist()
    column = (weights[:, source] * later[:, source]).tolist()
    entropy = (
        -torch.special.xlogy(weights[looks], weights[looks]).sum()
        / torch.tensor(float(looks + 1)).log()
    )
    said = {
        "row": (
            f"A row: where \u201c{tokens[looks]}\u201d looks",
            f"Bars sum to 1. Entropy {entropy:.2f} of its maximum; distance {far[looks]:.1f} "
            f"tokens on average, pairs counting at most {BOUND}.",
        ),
        "column": (
            f"A column: who looks back at \u201c{tokens[source]}\u201d",
            f"Bars sum to {sum(column):.2f}, the rest of each later row goes elsewhere. "
            f"Mean over {int(later[:, source].sum())} later tokens: {received[source]:.3f}.",
        ),
    }
    return {
        f"{name}.svg": picture(name, *said[name], tokens, prompt, chosen, bars)
        for name, chosen, bars in (("row", looks, row), ("column", source, column))
    }


if __name__ == "__main__":
    for name, text in pictures().items():
        Path(__file__).with_name(name).write_text(text, encoding="utf-8")
