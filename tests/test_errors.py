"""Errors follow the template, and name the function that was called and its own argument."""

import inspect
import math
from typing import Any, Union, get_args, get_origin

import pytest
import torch
from jaxtyping import AbstractArray

import tokenweights as tw
from tokenweights import TokenWeightsError, report
from tokenweights._errors import invalid, nearest, refused_by


def test_errors_follow_the_template():
    error = invalid("f", "x", "in [0, 1]", 2, "Divide by 2.")
    assert isinstance(error, TokenWeightsError) and isinstance(error, ValueError)
    assert str(error) == "`f`: expected `x` in [0, 1], got 2. Divide by 2."


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("low2hig", "low2high"),
        ("anchr20", "anchor20"),
        ("anchor", "anchor20"),
        ("low_to_high", "low2high"),
        ("nope", None),
        ("foo", None),
        ("uniform", None),
        ('{"name": "low2high", "warmup_steps": 20}', None),
    ],
)
def test_a_misspelt_recipe_has_a_nearest_one_and_another_word_has_none(value, expected):
    assert nearest(value, tw.recipe_names()) == expected


def test_a_part_of_a_long_name_can_be_near_enough_to_it():
    names = ["step", "completions/mean_length"]
    assert nearest("length", names) is None
    assert nearest("length", names, cutoff=0.4) == "completions/mean_length"


def test_a_refusal_inside_is_one_of_the_function_that_was_called():
    with pytest.raises(tw._errors.TokenWeightsTypeError) as error, refused_by("outer"):
        tw.front_fraction(torch.ones(1, 2).bool(), fraction="half")
    assert str(error.value).startswith("`outer`: expected `fraction` to be a number, got 'half'.")
    with pytest.raises(ZeroDivisionError), refused_by("outer"):
        raise ZeroDivisionError
    with pytest.raises(TokenWeightsError, match="no template"), refused_by("outer"):
        raise TokenWeightsError("no template")


MASK = torch.ones(2, 5, dtype=torch.bool)
SIZES = {"batch": 2, "heads": 4, "kv_heads": 2, "dim": 4, "vocab": 7, "layers": 2, "decile": 10}
STATISTICS = tw.AttentionStatistics(
    raw=torch.rand(2, 5), topk=torch.rand(2, 5), mean_distance=torch.rand(2, 5)
)
RECORD = report.TokenRecord(
    step=0, sample_id=0, prompt="", tokens=("a", "b"), token_ids=(0, 1), layer=0,
    attention_entropy=(0.25, 0.75), entropy_kind="normalized", alignment="own",
)  # fmt: skip
ENDS, BOUNDS = tw.Endpoints(0.0, 1.0), torch.tensor([0, 2, 5])
# Arguments that no annotation tells.
GOOD: dict[str, dict[str, Any]] = {
    "adaptive_progress": {"schedule": float},
    "attention_entropy_varlen": {"cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS},
    "attention_received_varlen": {"cu_seqlens_q": BOUNDS, "cu_seqlens_k": BOUNDS},
    "boxed_answer": {"response": "2"},
    "endpoint_schedule": {"low": float, "high": float},
    "endpoint_weights": {"endpoints": ENDS},
    "entropy_metrics": {"records": [RECORD]},
    "gathered": {"values": torch.rand(5), "dim": 0},
    "gradient_geometry": {"subset": [torch.ones(2)], "full": [torch.ones(2)]},
    "group_dynamics": {"groups": [MASK]},
    "group_projection_ratios": {"projection_ratio": MASK / 10, "count": 5},
    "linear_schedule": {"transition_steps": 3},
    "majority_at_k": {"answers": [["1"]], "references": ["1"]},
    "overlong_penalty": {"max_length": 10, "buffer_length": 4},
    "pass_at_k": {"k": 2},
    "piecewise_schedule": {"values": [1.0, 2.0], "boundaries": [3]},
    "quadrant_tokens": {"vocab_size": 5, "quadrant_count": 5},
    "reference_answer": {"answer": 2},
    "response_statistics": {"statistics": STATISTICS},
    "select": {"fraction": 0.5},
    "select_within": {"total": 1.0},
    "selection_bytes": {"dtype": torch.float32},
    "sharded_entropy": {"cu_seqlens": BOUNDS},
    "softmax_partition": {"extrema": tw.ScoreExtrema(torch.tensor(0.0), torch.tensor(1.0))},
    "subset_overlap": {"subsets": [MASK]},
    "support_by_entropy": {"statistics": STATISTICS},
    "support_concentration": {"statistics": STATISTICS, "groups": [MASK]},
    "token_records": {
        "prompts": ["", ""], "decode": str, "layer": 0, "entropy_kind": "raw", "alignment": "own",
    },
    "unclipped_losses": {"log_probs": lambda rows: torch.zeros(2, 5)[rows]},
}  # fmt: skip
# Of models, files, recipes and pages, which say in suites of their own what they refuse; and an
# answer, which is refused as `reference_answer` does wherever it is met.
ELSEWHERE = {
    "attention_layers", "boxed_match_reward", "capture_attention", "group_gradients",
    "probe_head_classes", "recipe", "recipe_names", "require_columns", "rollout_recipe",
    "selected_parameters", "token_alignment", "weighted_rollout", "with_head_classes",
}  # fmt: skip
OF_REPORTS = {"entropy_metrics", "token_records"}


def functions():
    for module in (tw, report):
        for name in module.__all__:
            function = getattr(module, name)
            asked = name not in ELSEWHERE and (module is tw or name in OF_REPORTS)
            if inspect.isfunction(function) and asked:
                yield pytest.param(name, function, id=name)


def options(hint):
    return get_args(hint) if get_origin(hint) in (Union, type(int | str)) else (hint,)


def is_tensor(hint):
    return get_origin(hint) is None and inspect.isclass(hint) and issubclass(hint, AbstractArray)


def tensor(hint):
    names = [name.lstrip("#") for name in hint.dim_str.split() if name[0] not in "*."]
    shape = [int(name) if name.isdigit() else SIZES.get(name, 5) for name in names]
    count = math.prod(shape)
    kind = hint.dtype.__name__
    if kind == "Float":
        return torch.linspace(0.1, 0.9, count).view(shape)
    return torch.ones(shape).bool() if kind == "Bool" else torch.arange(count).view(shape) % 5


def good(name, function):
    """Arguments that the function takes."""
    given = {}
    for argument, parameter in inspect.signature(function).parameters.items():
        if argument in GOOD.get(name, {}):
            given[argument] = GOOD[name][argument]
        elif parameter.default is parameter.empty:
            hint = next(option for option in options(parameter.annotation))
            given[argument] = tensor(hint) if is_tensor(hint) else {int: 3, float: 0.5}[hint]
    return given


def bad(hint, value):
    """Values of the right kind, some of them out of range."""
    if hint is float:
        yield from (math.nan, math.inf, -math.inf, -1.0, 0.0, 1.5, 1e300)
    elif hint is int:
        yield from (-1, 0)
    elif is_tensor(hint):
        value = value if isinstance(value, torch.Tensor) else tensor(hint)
        if value.is_floating_point():
            yield from (value * math.nan, value * math.inf, value - 100, -value, value * 0)
        elif value.dtype != torch.bool:
            yield from (value - 100, value + 10**6)


@pytest.mark.parametrize(("name", "function"), list(functions()))
def test_an_error_names_the_function_that_was_called_and_its_own_argument(name, function):
    given = good(name, function)
    function(**given)
    parameters = inspect.signature(function).parameters
    for argument, parameter in parameters.items():
        for hint in options(parameter.annotation):
            for value in bad(hint, given.get(argument)):
                # Where one of several is asked for, another one stands in for it.
                others = {"select": "fraction", "select_within": "total"}.get(name)
                spare = {} if others is None or argument not in ONE_OF[name] else {others: None}
                try:
                    function(**{**given, **spare, argument: value})
                except TokenWeightsError as error:
                    owner, _, rest = str(error).partition(": expected ")
                    named = rest.partition(" ")[0].strip("`,")
                    assert owner == f"`{name}`" and named in parameters, error


ONE_OF = {"select": {"count", "threshold"}, "select_within": {"mean"}}


def test_what_is_made_of_other_functions_names_itself():
    nan = torch.full((2, 5), math.nan)
    ids = torch.arange(2)
    record = {
        "step": 0, "sample_ids": ids, "prompts": ["", ""], "token_ids": MASK.long(), "layer": 0,
        "decode": str, "entropy_kind": "raw", "alignment": "own",
    }  # fmt: skip
    infinite = tw.AttentionStatistics(raw=nan, mean_distance=nan)
    far = tw.AttentionStatistics(raw=MASK.float(), mean_distance=nan)
    layers = torch.rand(2, 2, 5)
    for call, words in {
        lambda: tw.low_to_high(-1): "low_to_high`: expected `warmup_steps` >= 0, got -1",
        lambda: tw.high_to_low(-1): "high_to_low`: expected `warmup_steps` >= 0",
        lambda: tw.static_endpoints(math.nan, 0.0): "static_endpoints`: expected `low` in [0",
        lambda: tw.static_endpoints(0.0, -1.0): "static_endpoints`: expected `high` in [0",
        lambda: tw.layer_agreement(layers, MASK, fraction=1.5): "layer_agreement`: expected `fr",
        lambda: tw.token_weight_metrics(nan, MASK.float(), MASK): "`scores` finite",
        lambda: tw.support_by_entropy(infinite, MASK): "support_by_entropy`: expected `statisti",
        lambda: tw.support_by_entropy(far, MASK): "`statistics.mean_distance` finite",
        lambda: report.token_records(nan, MASK, **record): "token_records`: expected `attention",
        lambda: report.token_records(MASK.float(), MASK, weights=-MASK.float(), **record): (
            "token_records`: expected `weights`"
        ),
        lambda: report.entropy_metrics([], fraction=1.5): "entropy_metrics`: expected `fraction`",
        lambda: tw.attention_distance(*torch.rand(2, 1, 1, 2, 2), bound=0): "expected `bound`",
    }.items():
        with pytest.raises(TokenWeightsError) as error:
            call()
        assert words in str(error.value), error.value
