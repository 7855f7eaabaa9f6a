"""Look at one prompt and response with a model: token trace, figures, and all numbers as JSON."""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from tokenweights._errors import invalid
from tokenweights._hints import shown as in_words
from tokenweights.attention import ENTROPY_KINDS
from tokenweights.capture import attention_layers, middle_layer
from tokenweights.commands import texts
from tokenweights.commands.extras import imported
from tokenweights.commands.models import loaded_model, require_placement
from tokenweights.commands.named import recipe_choice
from tokenweights.commands.outputs import require_output
from tokenweights.commands.terminal import shown
from tokenweights.diagnostics import (
    LayerAgreement,
    layer_agreement,
    pearson_correlation,
    rank_correlation,
)
from tokenweights.recipes import Recipe, require_columns, rollout_recipe
from tokenweights.recipes.attention import Alignment
from tokenweights.report import (
    TokenRecord,
    append_token_records,
    attention_map_figure,
    entropy_relation_figure,
    inspected_records,
    layer_agreement_figure,
    quadrant_figure,
    response_figure,
    support_figure,
    trace_page_html,
)
from tokenweights.report.inspection import (
    RESPONSE_COLUMNS,
    response_readings,
    weighted_records,
)
from tokenweights.report.ranges import flat_range

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Every file that this command may write: those of an earlier call are deleted.
FIGURES = (
    *("response", "attention", "relation", "quadrants", "layers"),
    *(f"support_{kind}" for kind in ENTROPY_KINDS),
)
WRITTEN = (
    *("trace.html", "inspection.json", "tokens.jsonl"),
    *(f"{name}.png" for name in FIGURES),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "model",
        metavar="MODEL_OR_PATH",
        help="a transformers language model: a directory, a name on the Hub, or `lab`, the "
        "embedded policy of tokenweights-lab",
    )
    texts.add_arguments(parser)
    parser.add_argument(
        "--output", type=Path, default=Path("inspection"), help="directory to write into"
    )
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="layers to read; -1 is the last (default: the middle one)",
    )
    parser.add_argument("--kind", choices=ENTROPY_KINDS, help="entropy (default: normalized)")
    parser.add_argument(
        "--alignment",
        choices=get_args(Alignment),
        help="attention row that stands for a token (default: deciding)",
    )
    parser.add_argument(
        "--recipe",
        help="shows the weights that a recipe would give, its name or its fields as JSON; layers, "
        "kind and alignment are the recipe's",
    )
    parser.add_argument(
        "--step", type=int, default=0, help="training step of the recipe's schedule (default: 0)"
    )
    parser.add_argument(
        "--advantage",
        type=float,
        help="advantage of the response, for a recipe that reads it: above 0 for a good one",
    )
    parser.add_argument(
        "--largest", type=int, default=32, help="attention weights kept for each token"
    )
    parser.add_argument(
        "--figures",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw figures; this needs matplotlib",
    )
    parser.add_argument("--device", default="cpu", help="device of the model")
    parser.add_argument(
        "--dtype", default="auto", help="type of its weights, such as float32 or bfloat16"
    )


def run(options: argparse.Namespace) -> int:
    """Writes trace, figures, records and summary, and says where they are.

    Args:
        options: What was parsed.

    Returns:
        Exit status.
    """
    if options.figures:
        imported("matplotlib", extra="report")
    bar = imported("tqdm", extra="capture").tqdm
    # All that can be refused without the model is refused before it is loaded.
    _require_numbers(options)
    prompt, response = texts.given_texts(options)
    made = None if options.recipe is None else _recipe(options)
    require_output("inspect", options.output, folder=True)
    require_placement(dtype=options.dtype, device=options.device)
    model, tokenizer = loaded_model(options.model, dtype=options.dtype, device=options.device)
    prompt_ids, response_ids = texts.token_ids(
        options, prompt, response, model=model, tokenizer=tokenizer
    )
    ids = torch.tensor(prompt_ids + response_ids, device=model.device)
    if made is not None:
        made = made.on_model(model)
        if made.attention is not None:
            options.layers = list(made.layers)
            options.alignment = made.attention.alignment
        if made.entropy is not None:
            options.kind = made.entropy.entropy_kind
    options.kind = options.kind or "normalized"
    options.alignment = options.alignment or "deciding"
    available = list(attention_layers(model))
    depth = model.config.get_text_config().num_hidden_layers
    layers = options.layers or [_nearest(available, middle_layer(depth))]
    with bar(total=len(ids), desc="reading", unit=" tokens") as progress:
        records = inspected_records(
            model,
            ids,
            prompt_length=len(prompt_ids),
            decode=tokenizer.decode,
            layers=layers,
            entropy_kind=options.kind,
            alignment=options.alignment,
            largest=options.largest,
            progress=progress.update,
        )
    if made is not None:
        read = response_readings(model, ids, made, response_length=len(response_ids))
        records = weighted_records(
            records, made, step=options.step, advantage=options.advantage, readings=read
        )
    agreement = _agreement(records)
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        (folder / name).unlink(missing_ok=True)
    figures = _figures(records, agreement) if options.figures else {}
    for name, draw in bar(figures.items(), desc="drawing", unit=" figures"):
        draw().savefig(folder / f"{name}.png", dpi=150)
    append_token_records(folder / "tokens.jsonl", records)
    summary = _summary(options, records, agreement)
    text = json.dumps(_without_gaps(summary), indent=1, allow_nan=False)
    (folder / "inspection.json").write_text(text + "\n", encoding="utf-8")
    page = trace_page_html(records, title=f"Inspection: {Path(options.model).name}")
    (folder / "trace.html").write_text(page, encoding="utf-8")
    print(f"read   {len(prompt_ids)} prompt and {len(response_ids)} response tokens")
    if options.text is None:
        print(shown(f"answer {tokenizer.decode(response_ids)}"))
    if made is not None:
        weights = records[0].weights or ()
        mean = math.fsum(weights) / len(weights)
        print(f"recipe {made.name} at step {options.step}: mean weight {mean:.3f}")
    for record in records:
        if said := flat_range(record):
            print(f"note   layer {record.layer}: {said}")
    print(shown(f"open   {folder / 'trace.html'}"))
    others = [*(f"{name}.png" for name in figures), "inspection.json", "tokens.jsonl"]
    print(f"also   {', '.join(others)}")
    return 0


def _require_numbers(options: argparse.Namespace) -> None:
    refused = partial(invalid, "inspect")
    if not 0 <= options.step < 2**63:
        condition, hint = "in [0, 2**63 - 1]", "Count training steps from 0."
        raise refused("--step", condition, in_words(options.step), hint)
    if options.largest < 1:
        raise refused("--largest", ">= 1", in_words(options.largest), "Pass a number of tokens.")
    if options.advantage is not None and not math.isfinite(options.advantage):
        hint = "Pass 1 for a good response, -1 for a bad one."
        raise refused("--advantage", "a finite number", options.advantage, hint)


def _recipe(options: argparse.Namespace) -> Recipe:
    given = [name for name in ("layers", "kind", "alignment") if getattr(options, name) is not None]
    if given:
        hint = 'Change the recipe: {"name": NAME, "layers": [20]}.'
        condition = f"without --{given[0]}"
        raise invalid("inspect", "--recipe", condition, options.recipe, hint)
    choice = recipe_choice(options.recipe, command="inspect", argument="--recipe")
    made = rollout_recipe(choice, caller="inspect")
    if "advantages" in made.columns and options.advantage is None:
        hint = "Pass the one the response shall have: 1 for a good one, -1 for a bad one."
        condition = f"with {made.name!r}, which reads `advantages`"
        raise invalid("inspect", "--advantage", condition, "none", hint)
    require_columns(made, (*RESPONSE_COLUMNS, "advantages"), caller="inspect")
    return made


def _nearest(available: list[int], layer: int) -> int:
    if not available:
        hint = "Models with attention code of their own cannot be read."
        raise invalid("inspect", "MODEL_OR_PATH", "with attention layers", "none", hint)
    return min(available, key=lambda candidate: abs(candidate - layer))


def _agreement(records: list[TokenRecord]) -> LayerAgreement | None:
    if len(records) < 2:
        return None
    rows = [record.attention_entropy for record in records]
    scores = torch.tensor(rows, dtype=torch.float64)[:, None]
    return layer_agreement(scores, torch.ones(scores.shape[1:], dtype=torch.bool))


def _figures(
    records: list[TokenRecord], agreement: LayerAgreement | None
) -> dict[str, Callable[[], "Figure"]]:
    """Name and drawing of each figure; those of one layer are of the first."""
    record = records[0]

    figures: dict[str, Callable[[], Figure]] = {
        "response": partial(response_figure, record),
        "attention": partial(attention_map_figure, record),
        "relation": partial(entropy_relation_figure, [record]),
        "quadrants": partial(quadrant_figure, [record]),
    }
    for kind in ENTROPY_KINDS:
        figures[f"support_{kind}"] = partial(support_figure, [record], kind=kind)
    if agreement is not None:
        layers = [int(found.layer) for found in records if isinstance(found.layer, int)]
        figures["layers"] = partial(layer_agreement_figure, agreement, layers)
    return figures


def _summary(
    options: argparse.Namespace, records: list[TokenRecord], agreement: LayerAgreement | None
) -> dict[str, Any]:
    """Means of every column over all tokens, anchors and explorers; correlations; agreement."""
    summary: dict[str, Any] = {
        "model": options.model,
        "recipe": options.recipe,
        "step": options.step if options.recipe else None,
        "advantage": options.advantage if options.recipe else None,
        "prompt_tokens": len(records[0].prompt_tokens or ()),
        "response_tokens": len(records[0].tokens),
        "entropy_kind": options.kind,
        "alignment": options.alignment,
        "layers": [_layer_summary(record) for record in records],
    }
    if agreement is not None:
        summary["agreement"] = {
            "layers": [record.layer for record in records],
            "anchor_jaccard": agreement.anchor_jaccard.tolist(),
            "explorer_jaccard": agreement.explorer_jaccard.tolist(),
            "rank_correlation": agreement.rank_correlation.tolist(),
        }
    return summary


def _layer_summary(record: TokenRecord) -> dict[str, Any]:
    labels = record.group or ()
    places = {"all": list(range(len(record.tokens)))}
    for name in ("anchor", "explorer"):
        places[name] = [place for place, label in enumerate(labels) if label == name]
    columns = {
        "attention_entropy": record.attention_entropy,
        "predictive_entropy": record.predictive_entropy or (),
        "log_probs": record.log_probs or (),
        **(record.columns or {}),
    }
    means = {
        group: {
            "tokens": len(chosen),
            **{
                name: math.fsum(values[place] for place in chosen) / len(chosen)
                for name, values in columns.items()
                if chosen and values
            },
        }
        for group, chosen in places.items()
    }
    attention = torch.tensor([record.attention_entropy], dtype=torch.float64)
    predictive = torch.tensor([record.predictive_entropy or ()], dtype=torch.float64)
    mask = torch.ones(attention.shape, dtype=torch.bool)
    return {
        "layer": record.layer,
        "means": means,
        "attention_and_predictive_entropy": {
            "pearson": float(pearson_correlation(attention, predictive, mask)),
            "rank": float(rank_correlation(attention, predictive, mask)),
        },
    }


def _without_gaps(value: Any) -> Any:
    """The value with null in place of numbers that JSON does not know."""
    if isinstance(value, dict):
        return {name: _without_gaps(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_gaps(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
