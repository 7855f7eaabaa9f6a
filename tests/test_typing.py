"""Every annotated argument of every public function is checked, and refused in our own words."""

import collections.abc
import dataclasses
import inspect
import random
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import AbstractArray, Bool, Float, Int, TypeCheckError
from strategies import masks
from torch import Tensor

import tokenweights as tw
import tokenweights.report as report
from tokenweights import Endpoints, TokenWeightsError, _typing
from tokenweights._typing import typed

VALUES = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
MASK = torch.tensor([[True, True, False], [True, False, False]])
FREE = (Any, object)
DTYPES = {"Float": torch.float32, "Bool": torch.bool, "Int": torch.int64}


def functions_and_methods():
    for module in (tw, report):
        for value in vars(module).values():
            if inspect.isfunction(value):
                yield value.__name__, value
            elif inspect.isclass(value) and value.__module__.startswith("tokenweights"):
                for name, method in vars(value).items():
                    method = method.__func__ if isinstance(method, staticmethod) else method
                    own = name == "__init__" and not dataclasses.is_dataclass(value)
                    if inspect.isfunction(method) and (name[0] != "_" or own):
                        label = value.__name__ if name == "__init__" else f"{value.__name__}.{name}"
                        yield label, method


def parameters():
    for label, function in dict(functions_and_methods()).items():
        for name, parameter in inspect.signature(function).parameters.items():
            options = options_of(parameter.annotation)
            if name != "self" and not any(o in FREE or isinstance(o, TypeVar) for o in options):
                case = (label, function, name, options)
                yield pytest.param(*case, id=f"{label}-{name}")


def options_of(hint):
    if get_origin(hint) in (Union, UnionType):
        return [option for part in get_args(hint) for option in options_of(part)]
    return [hint]


def wrong_values(options):
    """Values that none of the options takes, each with a word that the refusal has to hold."""
    yield object(), "got an `object`"
    for option in options:
        origin = get_origin(option)
        if origin is Literal:
            yield get_args(option)[0] + "x", f"Did you mean {get_args(option)[0]!r}?"
        elif option in (int, float, bool):
            yield torch.ones(2, 2, dtype=torch.complex64), "got a complex64 tensor of shape (2, 2)"
            if not {str, float} & {*options} and not any(get_origin(o) is Literal for o in options):
                yield "1.5", "got '1.5'"
                yield 1.5 if float not in options else 1j, "got 1"
        elif inspect.isclass(option) and origin is None and issubclass(option, AbstractArray):
            shape = [1 for axis in option.dim_str.split() if axis[0] != "*"]
            yield torch.ones(shape, dtype=torch.complex64), "complex64 tensor"
            yield np.ones(shape, dtype=str), "array"
            if "*" not in option.dim_str:
                right = torch.ones([*shape, 1, 1, 1]).to(DTYPES[option.dtype.__name__])
                yield right, f"of shape {tuple(right.shape)}"
        elif origin is tuple and ... not in get_args(option):
            yield [object()], "got a `list` of length 1"
        elif inspect.isclass(origin) and issubclass(origin, collections.abc.Sequence):
            yield [object()], "got an `object` at index 0"
            if str not in options:
                yield "text", "got 'text'"
        elif inspect.isclass(origin) and issubclass(origin, collections.abc.Mapping):
            if get_args(option)[1] not in FREE:
                kinds = options_of(get_args(option)[0])
                under = "an `object` under the key" if str in kinds else "the key"
                yield {"key": object()}, f"got {under} 'key'"


@pytest.mark.parametrize(("label", "function", "name", "options"), list(parameters()))
def test_a_wrong_argument_is_refused_in_our_own_words(label, function, name, options):
    itself = [None] if "self" in inspect.signature(function).parameters else []
    for value, words in wrong_values(options):
        with pytest.raises(TypeCheckError) as error:
            function(*itself, **{name: value})
        message = str(error.value)
        assert isinstance(error.value, TokenWeightsError)
        assert message.startswith(f"`{label}`: expected `{name}` to be "), message
        assert words in message and message.endswith((".", "?")), message
        assert len(message) < 700 and "\n" not in message


@typed
def echo(
    values: Float[Tensor, "batch token"] | None = None,
    mask: Bool[Tensor, "batch token"] | None = None,
    *,
    ids: Int[Tensor, " batch"] | None = None,
    count: Float[Tensor, ""] | float | None = None,
    bound: float | None = None,
    share: float | None = None,
    number: int = 0,
    masks: Sequence[Bool[Tensor, "batch token"]] = (),
    numbers: Sequence[float] = (),
    layers: tuple[int, ...] = (),
    metrics: Mapping[str, float] | None = None,
    steps: Iterable[int] = (),
) -> Any:
    return values, mask, ids, count, bound, share, number, masks, numbers, layers, metrics, steps


def taken(**arguments):
    """What `echo` was handed for its one argument."""
    names = list(inspect.signature(echo).parameters)
    return echo(**arguments)[names.index(*arguments)]


def refusal(function, *args, **kwargs):
    with pytest.raises(TokenWeightsError) as error:
        function(*args, **kwargs)
    return str(error.value)


def test_a_refusal_names_argument_condition_value_and_remedy():
    assert refusal(tw.masked_sum, VALUES, torch.ones(2, 4).bool()) == (
        "`masked_sum`: expected `mask` to be a bool tensor of shape (batch=2, token=3), got a bool "
        "tensor of shape (2, 4). Its axes have to agree with those of `values`."
    )
    assert refusal(tw.masked_sum, VALUES.long(), MASK) == (
        "`masked_sum`: expected `values` to be a float tensor of shape (batch, token), got an "
        "int64 tensor of shape (2, 3). Pass `values.float()`."
    )
    assert refusal(tw.masked_sum, VALUES, 2 * MASK.int()) == (
        "`masked_sum`: expected `mask` to be a bool tensor of shape (batch=2, token=3), got an "
        "int32 tensor of shape (2, 3) with values other than 0 and 1. "
        "Pass the mask, as `mask != 0`."
    )
    assert refusal(tw.masked_sum, VALUES.tolist(), MASK) == (
        "`masked_sum`: expected `values` to be a float tensor of shape (batch, token), got a "
        "`list` of length 2. Pass a tensor, for example `torch.tensor(values)`."
    )
    assert refusal(tw.weighted_token_mean, VALUES, MASK, denominator="all_token") == (
        "`weighted_token_mean`: expected `denominator` to be one of 'all_tokens', "
        "'selected_tokens' or 'weight_sum', got 'all_token'. Did you mean 'all_tokens'?"
    )
    assert refusal(tw.piecewise_schedule, [1.0, "0.5"], [3]) == (
        "`piecewise_schedule`: expected `values` to be a sequence with every item a number, "
        "got '0.5' at index 1. Pass a number."
    )


def test_pythons_own_refusals_stay():
    with pytest.raises(TypeError, match=r"masked_sum\(\) got an unexpected keyword argument 'msk'"):
        tw.masked_sum(VALUES, msk=MASK)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'mask'"):
        tw.masked_sum(VALUES)
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        tw.masked_sum(VALUES, MASK, MASK)


@given(masks(), st.sampled_from(["int8", "uint8", "int16", "int32", "int64"]))
def test_integers_of_0_and_1_are_a_mask(mask, dtype):
    values = torch.arange(1.0, mask.numel() + 1).view(mask.shape)
    integers = mask.to(getattr(torch, dtype))
    assert torch.equal(tw.masked_sum(values, integers), tw.masked_sum(values, mask))
    right = tw.group_dynamics(values, [mask, mask])
    for meant in ([integers, mask], [integers.numpy()] * 2):
        found = tw.group_dynamics(values, meant)
        torch.testing.assert_close(vars(found), vars(right), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_integer_masks_and_counts_are_taken_in_a_compiled_graph(backend):
    def loss(values, mask, count):
        return tw.weighted_token_mean(values, mask, count=count) + tw.masked_sum(values, mask)

    torch.compiler.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    count = MASK.sum()
    found = compiled(VALUES, MASK.long(), count)
    assert found == loss(VALUES, MASK.long(), count) == loss(VALUES, MASK, 3.0) == 11 / 3 + 11


def test_counts_of_integers_are_exact_and_carry_no_gradient_away():
    assert taken(count=torch.tensor(2**24 + 1)) == 2**24 + 1
    loss = VALUES.clone().requires_grad_()
    tw.weighted_token_mean(loss, MASK.int(), count=MASK.sum()).backward()
    torch.testing.assert_close(loss.grad, MASK / 3)


def test_what_is_plainly_meant_is_taken():
    array = np.arange(6.0).reshape(2, 3)
    assert taken(values=array).data_ptr() == array.ctypes.data  # no copy
    backwards, frozen = array[::-1], array.copy()
    frozen.flags.writeable = False
    assert taken(values=backwards).tolist() == backwards.tolist()
    assert taken(values=frozen).tolist() == frozen.tolist()
    assert taken(mask=MASK.int().numpy()).tolist() == MASK.tolist()
    assert taken(ids=np.array([1, 65535], dtype=np.uint16)).tolist() == [1, 65535]
    assert taken(bound=torch.tensor(3)) == 3 and taken(number=np.int32(3)) == 3
    assert taken(number=torch.tensor(3)) == 3 and type(taken(number=torch.tensor(3))) is int
    assert taken(share=torch.tensor(torch.inf)) == taken(bound=np.float32("inf")) == torch.inf
    assert taken(numbers=torch.tensor([1.5, 2.0])) == taken(numbers=np.array([1.5, 2])) == [1.5, 2]
    assert taken(numbers=[torch.tensor(1.5), np.float32(2)]) == [1.5, 2.0]
    assert taken(layers=[1, np.int64(2)]) == (1, 2)
    assert taken(metrics={"loss": torch.tensor(1.5)}) == {"loss": 1.5}


@given(
    st.floats(allow_nan=False, width=32),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_scalar_is_the_very_number_that_it_holds(number, dtype):
    scalar = torch.tensor(number, dtype=dtype)
    assert type(taken(bound=scalar)) is float and taken(bound=scalar) == float(scalar)
    assert taken(numbers=[scalar]) == taken(numbers=scalar[None]) == [float(scalar)]
    assert taken(metrics={"loss": scalar}) == {"loss": float(scalar)}
    assert taken(bound=np.float32(number)) == number


def test_a_share_of_a_count_is_the_decimal_that_was_rounded():
    # 0.2 of five tokens is one, and what float32 makes of it would be two.
    assert taken(share=torch.tensor(0.2)) == taken(share=np.float32(0.2)) == 0.2
    assert taken(share=torch.tensor(0.7, dtype=torch.bfloat16)) == 0.7
    five, ones = torch.arange(5.0)[None], torch.ones(1, 5, dtype=torch.bool)
    for scalar in (torch.tensor(0.2), np.float32(0.2)):
        chosen = [
            tw.bottom_fraction(five, ones, fraction=scalar),
            tw.top_fraction(five, ones, fraction=scalar),
            tw.front_fraction(ones, fraction=scalar),
            tw.back_fraction(ones, fraction=scalar),
            tw.random_fraction(ones, fraction=scalar, seed=0),
            tw.select(five, ones, fraction=scalar),
        ]
        assert [int(subset.sum()) for subset in chosen] == [1] * 6
        agreement = tw.layer_agreement(five[None], ones, fraction=scalar)
        assert agreement.anchors.common == agreement.explorers.common == 1
        quantile = tw.score_quantile(
            torch.arange(6.0)[None], torch.ones(1, 6).bool(), fraction=scalar
        )
        assert quantile == 1


@given(st.floats(0, 1, width=32))
def test_a_score_reaches_itself_as_a_threshold_and_as_a_budget(number):
    scores = torch.tensor([[0.0, number, 1.0]])
    mask, own = torch.ones(1, 3, dtype=torch.bool), scores[0, 1]
    for scalar in (own, np.float32(number)):
        assert torch.equal(tw.select(scores, mask, threshold=scalar), scores >= own)
        assert torch.equal(tw.select(scores, mask, threshold=scalar, side="bottom"), scores <= own)
        for budget in ("total", "mean"):
            alone = scores[:, 1:2], mask[:, :1]
            expected = tw.select_within(*alone, **{budget: float(scalar)})
            assert torch.equal(tw.select_within(*alone, **{budget: scalar}), expected)
    tenth = torch.tensor([[0.1]])
    assert tw.select_within(tenth, torch.ones(1, 1).bool(), mean=tenth[0, 0]).item()


SHARES = {
    "back_fraction.fraction",
    "bottom_fraction.fraction",
    "entropy_metrics.fraction",
    "front_fraction.fraction",
    "head_classes.share",
    "layer_agreement.fraction",
    "probe_head_classes.share",
    "random_fraction.fraction",
    "score_quantile.fraction",
    "select.fraction",
    "support_by_entropy.fraction",
    "token_weight_metrics.fraction",
    "top_fraction.fraction",
}


def test_shares_of_counts_are_known_by_their_names():
    """A new argument that multiplies a count belongs here, and one that scores meet does not."""
    found = {
        f"{label}.{name}"
        for label, function in functions_and_methods()
        for name, parameter in inspect.signature(function).parameters.items()
        if name in _typing.SHARES and float in options_of(parameter.annotation)
    }
    assert found == SHARES


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bound": torch.tensor(0.5, requires_grad=True)}, "pass `bound.detach()`"),
        ({"numbers": torch.ones(2, requires_grad=True)}, "pass `numbers.detach()`"),
        ({"number": torch.tensor(2.0)}, "got a float32 tensor without axes"),
        ({"number": np.float64(2.5)}, "expected `number` to be an integer"),
        ({"bound": torch.ones(1)}, "got a float32 tensor of shape (1,)"),
        ({"values": np.array([["a"]])}, "got a <U1 array of shape (1, 1)"),
        ({"values": VALUES.bool()}, "Pass `values.float()`"),
        ({"ids": torch.ones(2)}, "Pass `ids.long()`"),
        ({"ids": torch.ones(2, dtype=torch.bool)}, "Pass `ids.long()`"),
        ({"mask": MASK.float()}, "Pass `mask.bool()`, if it holds 0 and 1 only"),
        ({"mask": -MASK.int()}, "with values other than 0 and 1"),
        ({"masks": [MASK, MASK[:1]]}, "got a bool tensor of shape (1, 3) at index 1"),
        ({"values": VALUES, "masks": [MASK[:1]]}, "agree with those of `values`"),
        ({"values": VALUES[0]}, "Give it the axes (batch, token)"),
        ({"count": VALUES}, "Pass one number."),
        ({"numbers": "12"}, "Pass a list, such as `[numbers]`"),
        ({"metrics": {"loss": "1"}}, "got '1' under the key 'loss'"),
        ({"metrics": {1: 1.0}}, "got the key 1"),
        ({"metrics": 1}, "Pass a dict."),
    ],
)
def test_what_is_not_plainly_meant_is_refused(arguments, words):
    assert words in refusal(echo, **arguments)


def test_an_argument_that_fits_is_handed_on_as_it_is():
    values = VALUES.clone().requires_grad_()
    numbers, steps = [1.0, 2], iter([1, 2])
    for name, value in {
        "values": values, "mask": MASK, "count": values.sum(), "masks": [MASK, MASK],
        "numbers": numbers, "metrics": {"loss": 1}, "steps": steps,
    }.items():  # fmt: skip
        assert taken(**{name: value}) is value
    assert list(steps) == [1, 2]


@given(st.integers(1, 40), st.data())
def test_every_item_is_looked_at_and_no_random_number_drawn(length, data):
    items = [1.0] * length
    place = data.draw(st.integers(0, length - 1))
    items[place] = "wrong"
    state = random.getstate()
    assert f"got 'wrong' at index {place}" in refusal(echo, numbers=items)
    assert f"got 'wrong' under the key {place}" in refusal(by_number, dict(enumerate(items)))
    assert random.getstate() == state


@typed
def by_number(values: Mapping[int, float]) -> None:
    """Takes a mapping."""


def test_a_result_of_another_kind_is_the_functions_own_fault():
    @typed
    def half(values: Float[Tensor, " token"]) -> Float[Tensor, " token"]:
        return values[: len(values) // 2]

    with pytest.raises(TypeCheckError) as error:
        half(torch.ones(4))
    assert not isinstance(error.value, TokenWeightsError)
    assert str(error.value).startswith("`half`: promises a float tensor of shape (token), returned")
    assert "not of the call" in str(error.value)


def test_a_class_may_be_named_before_it_exists():
    class Total:
        @typed
        def merged(self, other: "Endpoints") -> "tw.Endpoints":
            return other

    ends = Endpoints(1.0, 0.0)
    assert Total().merged(ends) is ends
    assert "expected `other` to be an `Endpoints`, got 1." in refusal(Total().merged, 1)


def test_a_hint_of_another_kind_is_judged_as_a_whole():
    @typed
    def function(value: Literal[1, 2]) -> int:
        return value

    assert function(2) == 2
    assert "expected `value` to be `typing.Literal[1, 2]`, got 3." in refusal(function, 3)


def test_without_checks_what_is_meant_is_taken_all_the_same():
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        assert torch.equal(taken(mask=MASK.int()), MASK)
        assert taken(share="wrong") == "wrong"
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_an_int_stands_where_a_float_is_annotated():
    assert tw.linear_schedule(1, 0, 2)(1) == 0.5


def test_checked_functions_compile_in_one_graph():
    torch.compiler.reset()
    compiled = torch.compile(tw.masked_sum, backend="eager", fullgraph=True)
    mask = torch.tensor([[True, False]])
    assert compiled(torch.tensor([[2.0, 5.0]]), mask).item() == 2.0
