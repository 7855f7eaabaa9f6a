import random

import pytest
import torch
from jaxtyping import TypeCheckError

import tokenweights as tw


def test_wrong_shapes_and_dtypes_are_refused_by_name():
    with pytest.raises(TypeCheckError, match="mask"):
        tw.masked_sum(torch.rand(2, 3), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeCheckError, match="mask"):
        tw.masked_sum(torch.rand(2, 3), torch.ones(2, 3))


def test_an_int_stands_where_a_float_is_annotated():
    assert tw.linear_schedule(1, 0, 2)(1) == 0.5


def test_checked_functions_compile_in_one_graph():
    torch.compiler.reset()
    compiled = torch.compile(tw.masked_sum, backend="eager", fullgraph=True)
    mask = torch.tensor([[True, False]])
    assert compiled(torch.tensor([[2.0, 5.0]]), mask).item() == 2.0


def test_checking_a_sequence_leaves_pythons_random_state_alone():
    mask = torch.ones(1, 2, dtype=torch.bool)
    state = random.getstate()
    for _ in range(20):
        tw.group_dynamics(torch.rand(1, 2), [mask, mask, mask])
        tw.piecewise_schedule([1.0, 0.5, 0.0], [1, 2])
        tw.majority_at_k([["1", None], ["2"]], ["1", "2"])
        tw.attention_statistics(torch.rand(1, 1, 2, 2), torch.rand(1, 1, 2, 2))
    assert random.getstate() == state
