from dataclasses import replace

import pytest

from tokenweights.report import TokenRecord

RECORD = TokenRecord(
    step=3,
    sample_id=17,
    prompt="1+1=?\n",
    tokens=("The", " answer", " is", "2", "\n"),
    token_ids=(5, 81, 12, 9, 1),
    attention_entropy=(0.0, 0.25, 0.5, 0.75, 1.0),
    weights=(1.0, 0.9, 0.5, 0.25, 0.0),
    advantages=(0.5, 0.5, 0.5, 0.5, -0.5),
    layer=2,
    entropy_kind="normalized",
    alignment="deciding",
    predictive_entropy=(0.0, 0.1, 2.0, 0.3, 0.4),
    log_probs=(-0.1, -0.2, -3.0, -0.4, -0.5),
    group=("anchor", "middle", "middle", "middle", "explorer"),
    reward=1.0,
)


@pytest.fixture(scope="session")
def record():
    """`record(**changes)` is a small valid record with the given fields changed."""
    return lambda **changes: replace(RECORD, **changes)
