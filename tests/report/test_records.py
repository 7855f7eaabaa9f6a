import json
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenweights import TokenWeightsError
from tokenweights.report import (
    TokenRecord,
    append_log,
    append_metrics,
    append_token_records,
    read_metrics,
    read_token_records,
    token_records,
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)
# Surrogates included: half of a character that a tokenizer split in two.
ANY_TEXT = st.text(st.characters(exclude_categories=()))


@st.composite
def records(draw):
    length = draw(st.integers(0, 4))

    def column(values):
        return draw(st.lists(values, min_size=length, max_size=length).map(tuple))

    return TokenRecord(
        step=draw(st.integers()),
        sample_id=draw(st.integers()),
        prompt=draw(ANY_TEXT),
        tokens=column(ANY_TEXT),
        token_ids=column(st.integers()),
        attention_entropy=column(FINITE),
        weights=column(st.floats(0, 1e300)),
        advantages=column(FINITE),
        layer=draw(st.one_of(st.integers(), st.lists(st.integers(), min_size=1).map(tuple))),
        entropy_kind=draw(st.sampled_from(["raw", "normalized", "topk", "fixed"])),
        alignment=draw(st.sampled_from(["deciding", "own"])),
        predictive_entropy=draw(st.none()) if draw(st.booleans()) else column(FINITE),
        log_probs=draw(st.none()) if draw(st.booleans()) else column(FINITE),
        group=column(st.sampled_from(["anchor", "middle", "explorer"])),
        reward=draw(st.one_of(st.none(), FINITE)),
        columns=draw(st.none() | st.dictionaries(ANY_TEXT, st.just(column(FINITE)), max_size=2)),
        prompt_tokens=("<", "1", "\ud83d"),
        attended=(attended := column(st.lists(st.integers(0, length + 2), max_size=3).map(tuple))),
        attended_weights=draw(st.just(tuple((0.25,) * len(row) for row in attended))),
    )


@given(entries=st.lists(records(), max_size=3))
def test_records_come_back_as_they_went(entries, tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "tokens.jsonl"
    append_token_records(path, entries[:1])
    append_token_records(path, iter(entries[1:]))
    assert list(read_token_records(path)) == entries
    assert len(path.read_bytes().splitlines()) == len(entries)


def test_a_cut_off_last_line_is_named_and_spares_the_next_record(tmp_path, record):
    path = tmp_path / "tokens.jsonl"
    append_token_records(path, [record(step=0), record(step=1)])
    path.write_bytes(path.read_bytes()[:-30])
    append_token_records(path, [record(step=2)])

    reader = read_token_records(path)
    assert next(reader).step == 0
    with pytest.raises(TokenWeightsError, match=r"tokens\.jsonl:2: "):
        next(reader)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], lines[2]]))
    assert [entry.step for entry in read_token_records(path)] == [0, 2]


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe{}",
        b"[1, 2]",
        b"{}",
        b'"text"',
    ],
)
def test_a_corrupt_line_is_named(line, tmp_path, record):
    path = tmp_path / "tokens.jsonl"
    append_token_records(path, [record()])
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(TokenWeightsError, match=r"tokens\.jsonl:2: "):
        list(read_token_records(path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", 1.5),
        ("step", True),
        ("tokens", "The answer"),
        ("tokens", 5),
        ("tokens", ["The", 1, " is", "2", "\n"]),
        ("token_ids", [1.0, 2, 3, 4, 5]),
        ("attention_entropy", [0.0]),
        ("attention_entropy", None),
        ("attention_entropy", [0.0, 0.1, 0.2, 0.3, 1e999]),
        ("weights", [1.0, 1.0, 1.0, 1.0, -0.1]),
        ("advantages", [math.nan, 0.5, 0.5, 0.5, 0.5]),
        ("log_probs", ["-1", 0.0, 0.0, 0.0, 0.0]),
        ("group", ["anchor", "middle", "middle", "middle", "expl0rer"]),
        ("layer", None),
        ("entropy_kind", "shannon"),
        ("alignment", None),
        ("reward", "1"),
        ("columns", [1.0]),
        ("columns", {"support": [1.0]}),
        ("columns", {"support": ["1"] * 5}),
        ("prompt_tokens", "<1"),
        ("attended", [[0], [], [], [], []]),
        ("attended_weights", [[1.0], [], [], [], []]),
        ("wieghts", [1.0]),
    ],
)
def test_a_wrong_field_is_named_with_its_line(field, value, tmp_path, record):
    path = tmp_path / "tokens.jsonl"
    append_token_records(path, [record()])
    line = json.loads(path.read_text()) | {field: value}
    path.write_text(json.dumps(line).replace("Infinity", "1e999") + "\n")
    with pytest.raises(TokenWeightsError, match=rf"tokens\.jsonl:1: .*{field}"):
        list(read_token_records(path))


def test_records_take_an_integer_mask():
    scores, mask = torch.rand(2, 3), torch.tensor([[1, 1, 0], [1, 0, 0]])
    options = {
        "step": 0,
        "sample_ids": torch.tensor([0, 1]),
        "prompts": ["p", "q"],
        "token_ids": torch.arange(6).view(2, 3),
        "decode": str,
        "layer": 0,
        "entropy_kind": "raw",
        "alignment": "own",
    }
    assert token_records(scores, mask, **options) == token_records(scores, mask.bool(), **options)
    with pytest.raises(TypeError, match="`token_records`: expected `mask`"):
        token_records(scores, 2 * mask, **options)


def tensor(values):
    return torch.from_numpy(np.array(values))


@pytest.mark.parametrize("made", [list, np.array, tensor])
def test_a_record_takes_lists_arrays_and_tensors(made, record):
    columns = {"support_size_0.9": (1.0, 2.0, 3.0, 4.0, 5.0)}
    attention = {"attended": ((0, 1),) * 5, "attended_weights": ((0.25, 0.75),) * 5}
    plain = record(columns=columns, prompt_tokens=("<", "1"), layer=(2, 3), **attention)
    names = ("token_ids", "attention_entropy", "weights", "advantages", "predictive_entropy")
    given = {name: made(getattr(plain, name)) for name in (*names, "layer", *attention)}
    if made is not list:
        given |= {name: made(getattr(plain, name)) for name in ("step", "sample_id", "reward")}
    given |= {name: list(getattr(plain, name)) for name in ("tokens", "group", "prompt_tokens")}
    given["columns"] = {name: made(values) for name, values in columns.items()}
    # `repr` tells NumPy's numbers from Python's, which equality does not.
    assert repr(replace(plain, **given)) == repr(plain)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["attention_entropy", "weights", "advantages", "log_probs"])
def test_a_record_refuses_what_is_not_finite(name, value, record):
    with pytest.raises(TokenWeightsError, match=rf"`{name}` to be finite.* position 2"):
        record(**{name: (0.0, 0.0, value, 0.0, 0.0)})


def test_metrics_come_back_and_not_finite_means_nan(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"step": 1, "reward": -0.1, "loss": math.nan})
    append_metrics(path, {"step": 2, "grad_norm": math.inf})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "reward": -0.1, "loss": None},
        {"step": 2, "grad_norm": None},
    ]
    first, second = read_metrics(path)
    assert first["step"] == 1 and first["reward"] == -0.1 and math.isnan(first["loss"])
    assert second["step"] == 2 and math.isnan(second["grad_norm"])


@pytest.mark.parametrize("metrics", [{}, {"reward": 1.0}, {"step": math.nan}])
def test_metrics_without_a_step_are_refused(metrics, tmp_path):
    with pytest.raises(TokenWeightsError, match="step"):
        append_metrics(tmp_path / "metrics.jsonl", metrics)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_log_without_a_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    append_log(None, {"reward": 1.0}, step=1)
    assert not list(tmp_path.iterdir())


def test_lines_of_verls_file_logger_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    data = '{"critic/rewards/mean": 0.5, "actor/lr": NaN, "note": "text", "done": true}'
    path.write_text(f'{{"step": 3, "data": {data}}}\n')
    (line,) = read_metrics(path)
    assert line.keys() == {"step", "critic/rewards/mean", "actor/lr"}
    assert line["step"] == 3 and line["critic/rewards/mean"] == 0.5 and math.isnan(line["actor/lr"])


@pytest.mark.parametrize(
    "line", ['{"step": 2, "reward": 0.', '{"step": 2, "note": "x"}', '{"reward": 1.0}', "3"]
)
def test_a_corrupt_metrics_line_is_named(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"step": 1})
    path.write_text(path.read_text() + line)
    with pytest.raises(TokenWeightsError, match=r"metrics\.jsonl:2: "):
        read_metrics(path)


@pytest.mark.parametrize(
    ("attended", "weights"),
    [
        (((7,), (), (), (), ()), ((1.0,), (), (), (), ())),
        (((-1,), (), (), (), ()), ((1.0,), (), (), (), ())),
        (((0,), (), (), (), ()), ((1.0, 0.5), (), (), (), ())),
        (((0,), (), (), (), ()), ((math.nan,), (), (), (), ())),
        ((0, 0, 0, 0, 0), ((1.0,), (), (), (), ())),
    ],
)
def test_attention_must_lie_in_the_context(attended, weights, record):
    with pytest.raises(TokenWeightsError, match="attended"):
        record(prompt_tokens=("<", "1"), attended=attended, attended_weights=weights)


def test_what_cannot_be_read_is_told_and_left_out(tmp_path, record):
    path, messages = tmp_path / "tokens.jsonl", []
    append_token_records(path, [record(step=0), record(step=1)])
    path.write_bytes(path.read_bytes() + b"\xff{}\n[]\n" + b"[" * 100_000 + b'\n{"step": 2, "tok')
    found = list(read_token_records(path, unreadable=messages.append))
    assert [entry.step for entry in found] == [0, 1]
    assert [message.split("tokens.jsonl:")[1].split(":")[0] for message in messages] == list("3456")
    # What is no text was never a line of a run; half a line was.
    assert "no text" in messages[0] and "stopped while writing" not in messages[0]
    assert "stopped while writing" in messages[-1]

    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"step": 1})
    path.write_text(path.read_text() + '{"step": 2, "rew')
    assert read_metrics(path, unreadable=messages.append) == [{"step": 1}]
    assert "metrics.jsonl:2: " in messages[-1]


def test_records_are_read_and_written_in_bounded_memory(tmp_path, record):
    path, many = tmp_path / "tokens.jsonl", 400
    values = tuple(map(float, range(500)))
    size = {"tokens": ("token",) * 500, "token_ids": (1,) * 500, "attention_entropy": values}
    columns = dict.fromkeys(("weights", "advantages", "predictive_entropy", "log_probs", "group"))
    entry = record(**size, **columns)
    tracemalloc.start()
    try:
        append_token_records(path, (entry for _ in range(many)))
        assert sum(1 for _ in read_token_records(path)) == many
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 3_500_000 and peak < 500_000
