"""`inspect` on a small model with a tokenizer of its own, saved as any model is."""

import itertools
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import tokenweights as tw
from tokenweights.__main__ import main
from tokenweights.recipes.backward import AttentionReading
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
    assert "read   5 prompt and 7 response tokens" in printed.out
    assert "reading: 100%" in printed.err and "drawing: 100%" in printed.err
    pictures = {path.stem for path in output.glob("*.png")}
    assert pictures == FIGURES | {"layers"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in output.glob("*.png"))
    records = list(read_token_records(output / "tokens.jsonl"))
    assert [record.layer for record in records] == [1, 3]
    assert "".join(records[0].tokens) == "2\n3-1=2" and records[0].prompt == "1+1=?"
    summary = json.loads((output / "inspection.json").read_text())
    assert summary["prompt_tokens"] == 5 and summary["response_tokens"] == 7
    means = summary["layers"][1]["means"]
    assert means["all"]["tokens"] == 7 and means["anchor"]["tokens"] == 2
    entropy = records[1].attention_entropy
    assert means["all"]["attention_entropy"] == pytest.approx(sum(entropy) / 7)
    assert means["all"]["support_size_0.9"] > 0
    assert summary["agreement"]["rank_correlation"][0][0] == pytest.approx(1)
    page = (output / "trace.html").read_text()
    assert "Layer 1" in page and "Layer 3" in page and "trace-strip" in page


def test_a_mark_splits_the_text_and_the_middle_layer_is_read(saved, text, tmp_path):
    text.write_text("1+1=?2\n3-1=?2\n")
    output = inspected(saved, text, tmp_path, "--split", "?", "--no-figures")
    (record,) = read_token_records(output / "tokens.jsonl")
    assert record.prompt == "1+1=?" and "".join(record.tokens) == "2\n3-1=?2"
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
    text.write_text("1+1=?2")
    output = inspected(saved, text, tmp_path, "--layers", "0", "1")
    (output / "mine.png").write_bytes(b"")
    assert (output / "layers.png").is_file()
    text.write_text("2+2=?")
    inspected(saved, text, tmp_path, "--no-figures")
    (record,) = read_token_records(output / "tokens.jsonl")
    assert "".join(record.tokens) == "+2=?"
    names = {path.name for path in output.iterdir()}
    assert names == {"trace.html", "inspection.json", "tokens.jsonl", "mine.png"}


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("", (), "0 prompt and 0 response tokens"),
        ("1", (), "1 prompt and 0 response tokens"),
        ("1+1", ("--split", "?"), "Pass a MARK that the text contains."),
        ("1+1", ("--split", ""), "Pass a MARK that the text contains."),
        ("1+1", ("--layers", "9"), "among the attention layers"),
        ("1+1", ("--prompt", "/nowhere.txt"), "/nowhere.txt"),
        ("1+1", ("--largest", "0"), "largest"),
        (b"\xff\xfe", (), "UTF-8"),
        ("1+1", ("--recipe", "low2hihg"), "Did you mean 'low2high'"),
        ("1+1", ("--recipe", "low2high", "--kind", "raw"), "without --kind"),
        ("1+1", ("--recipe", "entropy_bonus"), "reads `advantages`"),
        ("1+1", ("--recipe", "full", "--advantage", "nan"), "a finite number"),
        ("1+1", ("--recipe", "sampler_ratio_band"), "reads `sampler_log_probs`"),
        ("1+1", ("--chat",), "--chat"),
        ("1+1", ("--chat", "--split", "+"), "with a chat template"),
    ],
)
def test_wrong_input_is_named(content, options, words, saved, text, tmp_path, capsys):
    text.write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = ["inspect", str(saved), "--text", str(text), "--output", str(tmp_path / "out")]
    assert main([*arguments, *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


TWO = ("--prompt", "prompt.txt", "--text", "text.txt")
OWN = ("--prompt", "prompt.txt", "--generate", "5")
EARLY = {
    "no such device": ((*TWO, "--device", "foo"), "`--device` that this machine has, got foo"),
    "a device that is not there": ((*TWO, "--device", "hpu"), "that this machine has, got hpu"),
    "a device without numbers": ((*TWO, "--device", "meta"), "that this machine has, got meta"),
    "no such type": ((*TWO, "--dtype", "foo"), "expected `--dtype` auto or a floating-point type"),
    "a type of integers": ((*TWO, "--dtype", "int32"), "got 'int32'"),
    "a type too narrow": ((*TWO, "--dtype", "float8_e4m3fn"), "got 'float8_e4m3fn'"),
    "a module": ((*TWO, "--dtype", "nn"), "got 'nn'"),
    "a seed too large": ((*OWN, "--seed", f"{2**64}"), "expected `--seed` in [-2**63, 2**64 - 1]"),
    "a seed too low": ((*OWN, "--seed", f"{-(2**63) - 1}"), "expected `--seed`"),
    "no temperature": ((*OWN, "--temperature", "nan"), "expected `--temperature` 0 or in"),
    "an endless one": ((*OWN, "--temperature", "inf"), "got inf"),
    "a negative one": ((*OWN, "--temperature", "-1"), "got -1.0"),
    "one that overflows": ((*OWN, "--temperature", "1e-40"), "got 1e-40"),
    "nothing to generate": ((*OWN[:-1], "0"), "expected `--generate` >= 1, got 0"),
    "a step before the first": ((*TWO, "--step", "-3"), "`--step` in [0, 2**63 - 1], got -3"),
    "a step too large": ((*TWO, "--step", f"{10**400}"), "got 1000000"),
    "no attention weights": ((*TWO, "--largest", "0"), "expected `--largest` >= 1, got 0"),
    "no advantage": ((*TWO, "--advantage", "nan"), "a finite number, got nan"),
    "no prompt": (("--prompt", "nofile", *TWO[2:]), "`--prompt` a text file, got nofile: No"),
    "a folder as prompt": (
        ("--prompt", "folder", *TWO[2:]),
        "`--prompt` a text file, got folder: ",
    ),
    "no text": (("--text", "nofile"), "expected `--text` a text file, got nofile"),
    "no text in UTF-8": (("--text", "bytes"), "expected `--text` to be UTF-8, got bytes"),
    "two lines of a name": (("--text", "no\nfile"), "got no file"),
    "a file as folder": ((*TWO, "--output", "text.txt"), "`--output` a directory, got text.txt"),
    "a folder in a file": ((*TWO, "--output", "text.txt/x/y"), "got text.txt/x/y"),
    "no such recipe": ((*TWO, "--recipe", "nope"), "`tokenweights recipes` lists them."),
    "a recipe that is no JSON": ((*TWO, "--recipe", "{"), "expected `--recipe`"),
}


@pytest.mark.parametrize("case", EARLY)
def test_wrong_input_is_one_line_before_any_model_is_looked_for(
    case, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "prompt.txt").write_text("1+1=?")
    (tmp_path / "text.txt").write_text("2")
    before = sorted(tmp_path.rglob("*"))
    options, words = EARLY[case]
    assert main(["inspect", "/nowhere", "--no-figures", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert words in printed.err and "MODEL_OR_PATH" not in printed.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has one")
def test_a_machine_without_the_device_says_so(text, capsys):
    assert main(["inspect", "/nowhere", "--text", str(text), "--device", "cuda"]) == 2
    printed = capsys.readouterr().err
    assert "expected `--device` that this machine has, got cuda: " in printed


@pytest.mark.parametrize("dtype", ["float32", "float64", "half"])
def test_the_type_of_the_weights_can_be_named(dtype, saved, text, tmp_path):
    text.write_text("1+1=?2")
    output = inspected(saved, text, tmp_path, "--no-figures", "--dtype", dtype, "--device", "cpu")
    assert all(map(math.isfinite, record_of(output).attention_entropy))


def test_text_on_stdin_is_read_before_the_model(tmp_path):
    code = "import sys; from tokenweights.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "inspect", "/nowhere", "--text", "-", "--no-figures"]
    for given, words in ((b"\xff", "expected `--text` to be UTF-8, got -: "), (b"2", "/nowhere")):
        done = subprocess.run(command, input=given, capture_output=True, cwd=tmp_path, check=False)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1
        assert words in done.stderr.decode()


def record_of(output):
    (record,) = read_token_records(output / "tokens.jsonl")
    return record


def test_one_newline_ends_a_file_and_is_not_scored(saved, text, tmp_path):
    for end in ("", "\n"):
        text.write_text("1+1=?2" + end)
        assert record_of(inspected(saved, text, tmp_path, "--no-figures")).tokens[-1] == "2"
    text.write_text("1+1=?2\n\n")
    assert record_of(inspected(saved, text, tmp_path, "--no-figures")).tokens[-1] == "\n"


@pytest.fixture
def spoken(saved, tmp_path):
    """The model with a first token, a chat template and no unknown characters."""
    folder = tmp_path / "spoken"
    shutil.copytree(saved, folder)
    letters = [*"0123456789+-=?<>\n "]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"[\s\S]"), behavior="isolated"
    )
    backend.decoder = tokenizers.decoders.Fuse()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="> $A", special_tokens=[(">", vocabulary[">"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=">",
        eos_token="<",
        chat_template="{{ bos_token }}{% for message in messages %}{{ message['content'] }}="
        "{% endfor %}{% if add_generation_prompt %}?{% endif %}",
    ).save_pretrained(folder)
    return folder


def test_a_chat_template_brings_the_only_first_token(spoken, text, tmp_path):
    prompt = tmp_path / "prompt.txt"
    text.write_text("2\n")
    options = ("--prompt", str(prompt), "--no-figures")
    prompt.write_text("1+1\n")
    chat = record_of(inspected(spoken, text, tmp_path, *options, "--chat"))
    assert chat.prompt_tokens == (">", "1", "+", "1", "=", "?") and chat.tokens == ("2",)
    prompt.write_text(">1+1=?")  # a template pasted
    assert record_of(inspected(spoken, text, tmp_path, *options)).prompt_tokens == (
        chat.prompt_tokens
    )
    prompt.write_text("1+1=?")
    assert record_of(inspected(spoken, text, tmp_path, *options)).prompt_tokens == (
        chat.prompt_tokens
    )


def test_an_unknown_character_is_named(spoken, text, capsys):
    text.write_text("1+x")
    assert main(["inspect", str(spoken), "--text", str(text)]) == 2
    assert "'x' (WordLevel error" in capsys.readouterr().err


def test_the_model_answers_itself(spoken, tmp_path, capsys):
    prompt, output = tmp_path / "prompt.txt", tmp_path / "out"
    prompt.write_text("1+1=")
    common = ["inspect", str(spoken), "--prompt", str(prompt), "--no-figures"]
    common += ["--output", str(output), "--generate", "6"]
    answers = []
    for options in ([], [], ["--temperature", "1"], ["--temperature", "1", "--seed", "1"]):
        assert main([*common, *options]) == 0
        answers.append(record_of(output).token_ids)
        assert "answer " in capsys.readouterr().out
    assert answers[0] == answers[1] and len(set(answers)) == 3
    assert all(1 <= len(answer) <= 6 for answer in answers)
    ids = torch.tensor([[15, 1, 10, 1, 12]])
    model = Qwen3ForCausalLM.from_pretrained(spoken)
    with torch.no_grad():
        assert int(model(ids).logits[0, -1].argmax()) == answers[0][0]
    assert main([*common[:2], "--generate"]) == 2
    assert "with a prompt to answer" in capsys.readouterr().err
    assert main([*common, "--temperature", "-1"]) == 2


@pytest.mark.parametrize("step", [0, 100])
def test_a_recipe_shows_the_weights_it_would_give(saved, text, tmp_path, capsys, step):
    text.write_text("1+1=?2\n3-1=2")
    recipe = {"name": "low2high", "layers": [1], "warmup_steps": 100}
    options = ("--recipe", json.dumps(recipe), "--step", str(step), "--no-figures")
    record = record_of(inspected(saved, text, tmp_path, *options))
    assert record.layer == 1 and record.weights is not None
    scores = torch.tensor([record.attention_entropy])
    expected = tw.recipe(recipe).token_weights(
        scores, torch.ones_like(scores, dtype=torch.bool), step=step
    )
    assert record.weights == pytest.approx(tuple(expected[0].tolist()), abs=1e-5)
    order = sorted(range(len(record.tokens)), key=record.attention_entropy.__getitem__)
    lowest, highest = record.weights[order[0]], record.weights[order[-1]]
    assert (lowest, highest) == ((1.0, 0.0) if step == 0 else (0.0, 1.0))
    assert f"recipe low2high at step {step}: mean weight" in capsys.readouterr().out


READ_COLUMNS = [
    name for name in tw.recipe_names() if isinstance(tw.recipe(name).attention, AttentionReading)
]
FIRST, LAST, BOUND = 1, 3, 2


def top(values):
    """Places of the highest 40%, rounded up; of equal ones the later."""
    order = sorted(range(len(values)), key=lambda place: (values[place], place))
    return order[len(order) - math.ceil(2 * len(order) / 5) :]


def preplan_and_anchor(maps, prompt_length):
    """Distances, influences and both sets of one response, from a layer's eager attention."""
    mean = maps[0].double().mean(0)
    tokens = range(prompt_length, len(mean))
    far = [sum(float(mean[t, s]) * min(t - s, BOUND) for s in range(t + 1)) for t in tokens]
    influence = []
    for s in tokens:
        seen = [float(mean[t, s]) for t in range(s + FIRST, min(len(mean) - 1, s + LAST) + 1)]
        influence.append(sum(seen) / len(seen) if seen else 0.0)
    change = [abs(one - other) for one, other in itertools.pairwise(far)] + [0.0]
    return far, influence, {*top(change)}, {*top(influence)}


@pytest.mark.parametrize("name", READ_COLUMNS)
def test_a_recipe_that_reads_columns_shows_its_weights(name, saved, text, tmp_path, capsys):
    text.write_text("1+1=?2\n3-1=2<>-5+1")
    recipe = {"name": name, "first": FIRST, "last": LAST, "bound": BOUND}
    options = ("--recipe", json.dumps(recipe), "--split", "?", "--no-figures")
    record = record_of(inspected(saved, text, tmp_path, *options, "--advantage", "1"))
    assert (record.layer, record.alignment) == (2, "own")
    model = Qwen3ForCausalLM.from_pretrained(saved, attn_implementation="eager")
    letters = "0123456789+-=?<>\n "
    ids = torch.tensor([[letters.index(letter) for letter in text.read_text()]])
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions[record.layer]
    far, influence, preplan, anchors = preplan_and_anchor(maps, 5)
    assert record.columns[f"distance_{BOUND}"] == pytest.approx(far, abs=1e-5)
    assert record.columns[f"received_{FIRST}_{LAST}"] == pytest.approx(influence, abs=1e-5)
    sets = {"preplan40": preplan, "future_anchor40": anchors, "preplan_anchor40": preplan | anchors}
    if name in sets:
        assert record.weights == tuple(
            1.5 if place in sets[name] else 1.0 for place in range(len(record.tokens))
        )
    assert 1.0 < max(record.weights) <= 1.5
    page = (tmp_path / "out" / "trace.html").read_text()
    assert f"distance {BOUND}" in page and f"received {FIRST} {LAST}" in page
    assert f"recipe {name} at step 0: mean weight 1." in capsys.readouterr().out
    # Of a bad response no token is credited.
    bad = record_of(inspected(saved, text, tmp_path, *options, "--advantage", "-1"))
    assert set(bad.weights) == {1.0} and set(bad.advantages) == {-1.0}


@pytest.mark.parametrize("name", READ_COLUMNS)
def test_a_recipe_that_reads_the_advantage_asks_for_it(name, saved, text, capsys):
    """Before the model is loaded, and with what to do."""
    assert main(["inspect", "/nowhere", "--text", str(text), "--recipe", name]) == 2
    printed = capsys.readouterr().err
    assert f"`--advantage` with '{name}'" in printed and "1 for a good one" in printed


def test_the_embedded_policy_has_a_name(text, tmp_path, capsys, monkeypatch):
    pytest.importorskip("tokenweights_lab")
    text.write_text("a-3b-1c+7?1>a-3=8\n")
    output = inspected("lab", text, tmp_path, "--split", ">", "--no-figures")
    assert "".join(record_of(output).tokens) == "a-3=8"
    assert main(["check", "lab"]) == 0
    monkeypatch.setitem(sys.modules, "tokenweights_lab", None)
    assert main(["check", "lab"]) == 2
    assert "tokenweights-lab" in capsys.readouterr().err


@pytest.mark.parametrize("config", [None, '{"model_type": "qwen3", "hidden_size": -1}'])
def test_a_model_that_does_not_load_is_named(config, saved, text, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    (folder / "config.json").unlink()
    if config is not None:
        (folder / "config.json").write_text(config)
    assert main(["inspect", str(folder), "--text", str(text)]) == 2
    assert "expected `MODEL_OR_PATH` to load, got " in capsys.readouterr().err
