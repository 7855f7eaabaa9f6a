"""`inspect` on a small model with a tokenizer of its own, saved as any model is."""

import json

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tokenweights.__main__ import main
from tokenweights.report import read_token_records

tokenizers = pytest.importorskip("tokenizers")

FIGURES = {"response", "attention", "relation", "quadrants"} | {
    f"support_{kind}" for kind in ("raw", "normalized", "topk", "fixed")
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    letters = [*"0123456789+-=?<>\n "]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("<script>1+1=?2\n3-1=2\n", encoding="utf-8")
    return path


def inspected(saved, text, tmp_path, *options):
    output = tmp_path / "out"
    arguments = ["inspect", str(saved), "--text", str(text), "--output", str(output), *options]
    assert main(arguments) == 0
    return output


def test_it_writes_trace_figures_records_and_summary(saved, text, tmp_path, capsys):
    text.write_text("2\n3-1=2\n")
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("1+1=?")
    output = inspected(saved, text, tmp_path, "--prompt", str(prompt), "--layers", "1", "-1")
    printed = capsys.readouterr()
    assert "read   5 prompt and 8 response tokens" in printed.out
    assert "reading: 100%" in printed.err and "drawing: 100%" in printed.err
    pictures = {path.stem for path in output.glob("*.png")}
    assert pictures == FIGURES | {"layers"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in output.glob("*.png"))
    records = list(read_token_records(output / "tokens.jsonl"))
    assert [record.layer for record in records] == [1, 3]
    assert "".join(records[0].tokens) == "2\n3-1=2\n" and records[0].prompt == "1+1=?"
    summary = json.loads((output / "inspection.json").read_text())
    assert summary["prompt_tokens"] == 5 and summary["response_tokens"] == 8
    means = summary["layers"][1]["means"]
    assert means["all"]["tokens"] == 8 and means["anchor"]["tokens"] == 2
    entropy = records[1].attention_entropy
    assert means["all"]["attention_entropy"] == pytest.approx(sum(entropy) / 8)
    assert means["all"]["support_size_0.9"] > 0
    assert summary["agreement"]["rank_correlation"][0][0] == pytest.approx(1)
    page = (output / "trace.html").read_text()
    assert "Layer 1" in page and "Layer 3" in page and "trace-strip" in page


def test_a_mark_splits_the_text_and_the_middle_layer_is_read(saved, text, tmp_path):
    text.write_text("1+1=?2\n3-1=?2\n")
    output = inspected(saved, text, tmp_path, "--split", "?", "--no-figures")
    (record,) = read_token_records(output / "tokens.jsonl")
    assert record.prompt == "1+1=?" and "".join(record.tokens) == "2\n3-1=?2\n"
    assert record.layer == 2


def test_without_a_prompt_the_first_token_is_the_prompt(saved, text, tmp_path):
    text.write_text("1+1=?2")
    options = ("--kind", "raw", "--alignment", "own", "--no-figures")
    output = inspected(saved, text, tmp_path, *options)
    assert not list(output.glob("*.png"))
    (record,) = read_token_records(output / "tokens.jsonl")
    assert record.prompt == "1" and "".join(record.tokens) == "+1=?2"
    assert (record.entropy_kind, record.alignment) == ("raw", "own")


def test_a_second_inspection_replaces_the_first(saved, text, tmp_path):
    for content in ("1+1=?2", "2+2=?"):
        text.write_text(content)
        output = inspected(saved, text, tmp_path, "--no-figures")
    (record,) = read_token_records(output / "tokens.jsonl")
    assert "".join(record.tokens) == "+2=?"


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("", (), "0 prompt and 0 response tokens"),
        ("1", (), "1 prompt and 0 response tokens"),
        ("1+1", ("--split", "?"), "--split"),
        ("1+1", ("--layers", "9"), "among the attention layers"),
        ("1+1", ("--prompt", "/nowhere.txt"), "/nowhere.txt"),
        ("1+1", ("--largest", "0"), "largest"),
        (b"\xff\xfe", (), "UTF-8"),
    ],
)
def test_wrong_input_is_named(content, options, words, saved, text, tmp_path, capsys):
    text.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["inspect", str(saved), "--text", str(text), "--output", str(tmp_path / "out")]
    assert main([*arguments, *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_load_is_named(text, tmp_path, capsys):
    assert main(["inspect", str(tmp_path), "--text", str(text)]) == 2
    assert "MODEL_OR_PATH" in capsys.readouterr().err
