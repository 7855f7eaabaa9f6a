import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tokenweights import TokenWeightsError
from tokenweights.report import inspected_records

SIZES = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def qwen():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, initializer_range=0.3)).eval()


def gemma():
    """Sliding windows in every other layer, soft caps on scores and on logits."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, sliding_window=5, initializer_range=0.3)
    return Gemma2ForCausalLM(config).eval()


MODELS = {"qwen": qwen(), "gemma": gemma()}
IDS = torch.arange(17) * 7 % 11


def text(ids):
    return "|".join(map(str, ids))


def inspected(model, **options):
    given = {"prompt_length": 4, "decode": text, "layers": [0, 1, 2]} | options
    return inspected_records(MODELS[model], IDS, **given)


@pytest.fixture(scope="module", params=MODELS)
def eager(request):
    """Attention matrices and log-probabilities of one pass over the whole sequence."""
    model = MODELS[request.param]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(IDS[None], output_attentions=True)
    model.set_attn_implementation(before)
    weights = [layer[0].mean(0) for layer in output.attentions]
    return request.param, weights, output.logits[0].log_softmax(-1)


@pytest.mark.parametrize("alignment", ["deciding", "own"])
def test_values_are_those_of_the_full_attention_matrix(eager, alignment):
    name, layers, log_probs = eager
    rows = slice(3, 16) if alignment == "deciding" else slice(4, 17)
    records = inspected(name, alignment=alignment, entropy_kind="raw", largest=20)
    assert [record.layer for record in records] == [0, 1, 2]
    for record, weights in zip(records, layers, strict=True):
        entropy = torch.special.entr(weights).sum(-1)[rows]
        torch.testing.assert_close(
            torch.tensor(record.attention_entropy), entropy, atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(matrix(record), weights[rows], atol=1e-5, rtol=1e-4)
        distance = torch.arange(17)[rows][:, None] - torch.arange(17)
        columns = {name: torch.tensor(values) for name, values in record.columns.items()}
        mean = (weights[rows] * distance).sum(-1)
        torch.testing.assert_close(columns["mean_distance"], mean, atol=1e-5, rtol=1e-4)
        largest = weights[rows].amax(-1)
        torch.testing.assert_close(columns["max_weight"], largest, atol=1e-5, rtol=1e-4)
        half = 1 + (weights[rows].sort(descending=True).values.cumsum(-1) < 0.5).sum(-1)
        torch.testing.assert_close(columns["support_size_0.5"], half.float())
        # Whatever row is read, both belong to the distribution a token was drawn from.
        chosen = log_probs[3:16].gather(-1, IDS[4:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(record.log_probs), chosen, atol=1e-5, rtol=1e-4)
        doubt = -(log_probs.exp() * log_probs).sum(-1)[3:16]
        torch.testing.assert_close(
            torch.tensor(record.predictive_entropy), doubt, atol=1e-5, rtol=1e-4
        )


def matrix(record):
    """The recorded weights, `token context`."""
    shown = torch.zeros(len(record.tokens), len(IDS))
    rows = zip(record.attended, record.attended_weights, strict=True)
    for row, (places, shares) in enumerate(rows):
        shown[row, list(places)] = torch.tensor(shares)
    return shown


@settings(max_examples=15)
@given(chunk=st.integers(1, 20), name=st.sampled_from([*MODELS]))
def test_chunks_change_nothing(chunk, name):
    whole = inspected(name)
    for one, other in zip(whole, inspected(name, chunk_tokens=chunk), strict=True):
        assert one.tokens == other.tokens and one.prompt_tokens == other.prompt_tokens
        for field in ("attention_entropy", "predictive_entropy", "log_probs"):
            first, second = (torch.tensor(getattr(record, field)) for record in (one, other))
            torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(matrix(one), matrix(other), atol=1e-5, rtol=1e-4)


def test_a_record_has_texts_groups_and_every_column():
    (record,) = inspected("qwen", layers=[-1], largest=2)
    assert record.prompt == "0|7|3|10" and record.prompt_tokens == ("0", "7", "3", "10")
    assert record.tokens == tuple(map(str, IDS[4:].tolist()))
    assert record.group.count("anchor") == record.group.count("explorer") == 3
    assert all(len(row) == 2 for row in record.attended)
    assert set(record.columns) == {
        *(f"{kind}_entropy" for kind in ("raw", "topk", "fixed")),
        *(f"support_size_{mass}" for mass in (0.5, 0.8, 0.9, 0.95)),
        *("mean_distance", "local_mass_128", "max_weight"),
    }


def test_progress_counts_every_token_once():
    seen = []
    inspected("qwen", chunk_tokens=5, progress=seen.append)
    assert seen == [5, 5, 5, 2]


@pytest.mark.parametrize("length", [0, 17, 20])
def test_prompt_and_response_are_needed(length):
    with pytest.raises(TokenWeightsError, match="prompt_length"):
        inspected("qwen", prompt_length=length)
