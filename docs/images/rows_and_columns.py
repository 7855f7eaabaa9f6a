"""Draws rows.svg and columns.svg: one attention map of the embedded policy, read in two directions.

`python docs/images/rows_and_columns.py` writes both anew.
"""

from html import escape
from pathlib import Path

import torch
from tokenweights_lab import load_policy, load_tokenizer

import tokenweights as tw

PROMPT, RESPONSE, LAYER = "a+8b+8c+9?0>", r"a+8=8b+8=6c+9=5\boxed{65}", 2
CELL, LEFT, BARS = 11, 24, 60
STYLE = """
.NAME { --accent: #4051b5; max-width: 100%; height: auto; font: 9px ui-monospace, monospace; }
.NAME { color: var(--md-default-fg-color, #24292f); }
@media (prefers-color-scheme: dark) { .NAME { --accent: #8c9eff; color: #d0d7de; } }
[data-md-color-scheme="default"] .NAME { --accent: #4051b5; color: inherit; }
[data-md-color-scheme="slate"] .NAME { --accent: #8c9eff; color: inherit; }
.NAME text { fill: currentColor; text-anchor: middle; }
.NAME .say { font: 11px system-ui, sans-serif; text-anchor: start; }
.NAME .cell, .NAME .bar { fill: var(--accent); }
.NAME .chosen { fill: none; stroke: currentColor; stroke-width: 1.5; }
.NAME .prompt { fill: currentColor; fill-opacity: 0.06; }
"""


def attention() -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, head-averaged weights `query key`, entropy of each row and sum of each column."""
    model, tokenizer = load_policy(), load_tokenizer()
    ids = [token for text in (PROMPT, RESPONSE) for token in tokenizer(text)["input_ids"]]
    with torch.no_grad(), tw.capture_attention(model, [LAYER]) as capture:
        model(torch.tensor([ids]))
    (seen,) = capture.calls[LAYER]
    weights = tw.attention_weights(seen.query, seen.key)[0]
    entropy = tw.attention_entropy(seen.query, seen.key)[0]
    received = tw.attention_received(seen.query, seen.key, horizon=(1, None), reduction="sum")[0]
    return tokenizer.convert_ids_to_tokens(ids), weights, entropy, received


def drawing(name: str, say: str, parts: list[str], width: int, height: int) -> str:
    """An SVG that takes the colours of the page it stands in."""
    head = f'<svg class="{name}" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    head += f' width="{width}" role="img" aria-labelledby="{name}-title">'
    title = f'<title id="{name}-title">{escape(say)}</title>'
    style = f"<style>{STYLE.replace('NAME', name)}</style>"
    return "\n".join([head, title, style, *parts, "</svg>\n"])


def rectangle(kind: str, x: float, y: float, width: float, height: float, more: str = "") -> str:
    """One rectangle of a class."""
    size = f'width="{width:.1f}" height="{height:.1f}"'
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size}{more}/>'


def main() -> None:
    """Write both pictures."""
    tokens, weights, entropy, received = attention()
    first, count = len(PROMPT), len(tokens)
    side, top = CELL * count, 30
    shared = [rectangle("prompt", LEFT, top, CELL * first, side)]
    for place, token in enumerate(tokens):
        middle = place * CELL + CELL * 0.75
        shared.append(f'<text x="{LEFT - 8}" y="{top + middle:.1f}">{escape(token)}</text>')
        shared.append(f'<text x="{LEFT + middle - 3:.1f}" y="{top - 4}">{escape(token)}</text>')
    for t, s in (weights > 0.01).nonzero().tolist():
        opacity = f' fill-opacity="{float(weights[t, s]) ** 0.5:.2f}"'
        x, y = LEFT + s * CELL, top + t * CELL
        shared.append(rectangle("cell", x, y, CELL - 1, CELL - 1, opacity))

    row = first + int(entropy[first:].argmin())
    bars = [
        rectangle("bar", LEFT + side + 6, top + t * CELL, BARS * float(value), CELL - 2)
        for t, value in enumerate(entropy)
    ]
    chosen = rectangle("chosen", LEFT - 1, top + row * CELL - 1, CELL * (row + 1) + 1, CELL + 1)
    say = f"Row: what “{tokens[row]}” looks at. Right: entropy of each row, here {entropy[row]:.2f}"
    label = f'<text class="say" x="{LEFT}" y="12">{escape(say)}</text>'
    width, height = LEFT + side + BARS + 8, top + side + 4
    page = drawing("rows", say, [label, *shared, chosen, *bars], width, height)
    Path(__file__).with_name("rows.svg").write_text(page)

    column = first + int(received[first:].argmax())
    scale = BARS / float(received.max())
    bars = [
        rectangle("bar", LEFT + s * CELL, top + side + 6, CELL - 2, scale * float(value))
        for s, value in enumerate(received)
    ]
    x, y = LEFT + column * CELL - 1, top + column * CELL - 1
    chosen = rectangle("chosen", x, y, CELL + 1, CELL * (count - column) + 1)
    say = f"Column: who looks back at “{tokens[column]}”. Below: sum of each column,"
    say += f" here {received[column]:.2f}"
    label = f'<text class="say" x="{LEFT}" y="12">{escape(say)}</text>'
    width, height = LEFT + side + 8, top + side + BARS + 10
    page = drawing("columns", say, [label, *shared, chosen, *bars], width, height)
    Path(__file__).with_name("columns.svg").write_text(page)


if __name__ == "__main__":
    main()
