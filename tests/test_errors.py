from tokenweights import TokenWeightsError
from tokenweights._errors import invalid


def test_errors_follow_the_template():
    error = invalid("f", "x", "in [0, 1]", 2, "Divide by 2.")
    assert isinstance(error, TokenWeightsError) and isinstance(error, ValueError)
    assert str(error) == "`f`: expected `x` in [0, 1], got 2. Divide by 2."
