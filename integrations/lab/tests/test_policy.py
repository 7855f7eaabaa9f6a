import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config

from tokenweights_lab.policy import (
    load_policy,
    load_tokenizer,
    policy_config,
    policy_path,
    untrained_policy,
)
from tokenweights_lab.task import corpus_line, problems
from tokenweights_lab.tokenizer import VOCABULARY
from tokenweights_lab.warm_start import METADATA_KEY, WarmStart, batch_tensors, imitation_loss

WEIGHTS = policy_path() / "model.safetensors"


def test_the_file_was_made_by_the_script_s_configuration():
    with safe_open(WEIGHTS, "pt") as file:
        assert file.metadata()[METADATA_KEY] == WarmStart().to_json()


def test_the_file_has_the_configuration_s_parameters():
    expected = {name: tuple(p.shape) for name, p in untrained_policy().named_parameters()}
    with safe_open(WEIGHTS, "pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    assert stored == expected
    assert sum(p.numel() for p in untrained_policy().parameters()) == 200_384


def test_the_saved_configuration_is_the_policy_s():
    assert policy_config().vocab_size == len(VOCABULARY)
    saved = Qwen3Config.from_pretrained(policy_path()).to_diff_dict()
    for name, value in policy_config().to_diff_dict().items():
        if name != "transformers_version":
            assert saved[name] == value, name


def test_the_file_is_small():
    assert WEIGHTS.stat().st_size < 2_000_000


def test_auto_classes_load_the_policy():
    model = AutoModelForCausalLM.from_pretrained(policy_path())
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 1
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 0
    for left, right in zip(model.parameters(), load_policy().parameters(), strict=True):
        assert torch.equal(left, right)


def test_dtype():
    assert {p.dtype for p in load_policy(dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_untrained_policy_depends_on_its_seed_and_leaves_the_global_state():
    state = torch.get_rng_state()
    weights = [untrained_policy(seed=seed).lm_head.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert untrained_policy().model.layers[3].self_attn.q_norm.weight.eq(2).all()


def test_the_policy_knows_the_careful_procedure():
    lines = [corpus_line(123, index, terms=(5, 14), style="mixed") for index in range(64)]
    ids, mask = batch_tensors(lines, load_tokenizer())
    with torch.no_grad():
        assert imitation_loss(load_policy(), ids, mask) < 0.2
        assert imitation_loss(untrained_policy(), ids, mask) > 3.0


def test_every_prompt_and_solution_fits():
    longest = max(len(p.prompt) for p in problems("hard", 50))
    assert longest + 81 <= policy_config().max_position_embeddings
