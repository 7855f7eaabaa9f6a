import dataclasses
import inspect

import pytest

import tokenweights as tw

PUBLIC = {name: getattr(tw, name) for name in tw.__all__}


def test_the_public_face_is_flat_sorted_and_complete():
    assert sorted(tw.__all__) == tw.__all__
    exported = {
        name
        for name, value in vars(tw).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert exported == set(tw.__all__)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_is_documented_with_a_running_example(name):
    value = PUBLIC[name]
    assert value.__doc__, name
    if inspect.isfunction(value):
        assert "Returns:" in value.__doc__ or "Yields:" in value.__doc__, name
        assert ">>>" in value.__doc__ or name == "attention_layers", name
        for parameter in inspect.signature(value).parameters:
            assert f"{parameter}:" in value.__doc__, f"{name} does not document {parameter}"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_signatures_hide_nothing(name):
    value = PUBLIC[name]
    if inspect.isfunction(value):
        kinds = {p.kind for p in inspect.signature(value).parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    if dataclasses.is_dataclass(value):
        assert value.__dataclass_params__.frozen
