"""`check`: what it says of a configuration is what the tap does with the model."""

import json
import os
import subprocess
import sys

import families
import pytest
import torch
import transformers
from tiny_models import batch, tiny
from transformers import Qwen3Config

import tokenweights as tw
from tokenweights.__main__ import main

HEADS = ["layer", "kind", "heads", "kv heads", "attention entropy"]


@pytest.fixture(autouse=True)
def _quiet():
    with families.quiet():
        yield


@pytest.fixture
def checked(tmp_path, capsys):
    """Rows of the table, what stands below it, exit status and error of a configuration."""

    def check(config):
        config.save_pretrained(tmp_path)
        status = main(["check", str(tmp_path)])
        captured = capsys.readouterr()
        table, _, below = captured.out.partition("\n\n")[2].partition("\n\n")
        rows = [[cell.strip() for cell in line.split("  ") if cell] for line in table.splitlines()]
        assert not rows or rows[0] == HEADS
        return rows[1:], below.strip(), status, captured.err

    return check


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma2", "gpt_oss", "qwen3_moe", "gpt2", "deepseek_v3"]
)
def test_windows_and_heads_are_those_of_a_forward_with_weights(family, checked):
    model = tiny(family)
    ids, _ = batch()
    with torch.no_grad(), tw.capture_attention(model, tw.attention_layers(model)) as capture:
        model(ids)
    rows, below, status, error = checked(model.config)
    assert status == 0 and error == ""
    for row, (layer, (call,)) in zip(rows, capture.calls.items(), strict=True):
        kind = "full" if call.window is None else f"window of {call.window}"
        heads, kv_heads = call.query.shape[1], call.key.shape[1]
        assert row == [str(layer), kind, str(heads), str(kv_heads), "yes"]
    (taken,) = tw.recipe("low2high").on_model(model).layers
    assert below == f"low2high reads layer {taken}"


@pytest.mark.parametrize(
    ("task", "family"),
    [
        ("causal", "qwen3_next"),
        ("causal", "llama4_text"),
        ("causal", "diffllama"),
        ("causal", "bloom"),
        ("causal", "hrm_text"),
        ("causal", "deepseek_v32"),
        ("causal", "inkling_text"),
        ("image", "qwen2_5_vl"),
        ("encoder", "t5"),
        ("encoder", "t5gemma"),
        ("encoder", "led"),
    ],
)
def test_a_verdict_is_that_of_a_small_model_with_weights(task, family, checked):
    try:
        model = families.small_model(task, family)
    except families.NotBuilt:
        pytest.skip(f"transformers {transformers.__version__} builds no small {family}")
    expected = families.outcome(model)
    rows, _, status, error = checked(model.config)
    assert status == (0 if expected.right else 2) and bool(error) == (not expected.right)
    assert {int(row[0]) for row in rows if row[4] == "yes"} == set(expected.right)
    for reason in expected.refused:
        own = "attention code" in reason or "stacks" in reason
        assert own or any(row[4] == f"no: {reason}" for row in rows)


def test_layers_without_attention_are_named_by_their_type(checked):
    rows, below, *_ = checked(families.small_model("causal", "qwen3_next").config)
    others = [row for row in rows if row[4] != "yes"]
    assert others and all(row[1:4] == ["linear", "-", "-"] for row in others)
    assert below.startswith("low2high reads layer ")


def test_a_layer_that_the_recipe_would_take_in_vain_is_told(checked):
    config = transformers.Llama4TextConfig(
        hidden_size=32,
        num_hidden_layers=9,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        layer_types=["full_attention", *["chunked_attention"] * 8],
    )
    rows, below, status, _ = checked(config)
    assert status == 0 and [row[1] for row in rows] == ["full", *["chunked"] * 8]
    said, _, instead = below.partition("; ")
    assert said == "low2high reads layer 5, which is refused"
    named, _, reads = instead.partition(" reads layer ")
    assert tw.recipe(json.loads(named)).layers == (0,) and reads == "0"


def test_a_model_of_any_size_takes_no_memory(checked):
    config = Qwen3Config(hidden_size=2**17, intermediate_size=2**19, num_hidden_layers=3)
    rows, *_ = checked(config)  # terabytes of weights
    assert [row[4] for row in rows] == ["yes"] * 3


def refused(capsys, *arguments):
    assert main(["check", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_an_unknown_name_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert "expected `MODEL` to load, got no/such: " in refused(capsys, "no/such")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "to load"),
        ("{", "to load"),
        ('{"model_type": "abacus"}', "abacus"),
        ('{"model_type": "vit"}', "a language model, got ViTConfig"),
        ('{"model_type": "qwen3", "hidden_size": -1}', "to load"),
        ('{"model_type": "bloom"}', "attention code of their own"),
    ],
)
def test_what_is_no_language_model_is_one_line(config, words, tmp_path, capsys):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert words in refused(capsys, tmp_path)


def test_code_beside_a_configuration_never_runs(tmp_path, capsys):
    (tmp_path / "own.py").write_text("raise SystemExit('ran')")
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    assert "custom code" in refused(capsys, tmp_path)


def test_without_a_network_only_the_command_speaks(tmp_path):
    """The Hub's own lines, one for each try, are not shown; nobody waits between the tries."""
    code = (
        "import sys, time; time.sleep = lambda _: None; "
        "from tokenweights.__main__ import main; "
        "print(main(['check', 'no/such']), main(['inspect', 'no/such', '--text', 'text.txt']))"
    )
    (tmp_path / "text.txt").write_text("1+1=2")
    environment = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.stdout == "2 2\n"
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["tokenweights check", "tokenweights inspect"]
    assert all("to load, got no/such: " in line and ".." not in line for line in lines)


def test_a_missing_extra_is_named():
    code = (
        "import sys; sys.modules['transformers'] = None; "
        "from tokenweights.__main__ import main; sys.exit(main(['check', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install 'tokenweights[capture]'" in done.stderr
