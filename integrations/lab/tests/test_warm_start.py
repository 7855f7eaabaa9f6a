import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenweights_lab.policy import load_tokenizer, untrained_policy
from tokenweights_lab.task import CorpusLine, held_out
from tokenweights_lab.warm_start import (
    Phase,
    WarmStart,
    batch_tensors,
    imitation_loss,
    learning_rate_factor,
    phase_batch,
    warm_started_policy,
    write_policy,
)

EVEN = (1.0,) * 12
SHORT = WarmStart(
    seed=3,
    phases=(
        Phase(steps=3, style="careful", term_weights=EVEN, curriculum_steps=1, batch_size=4),
        Phase(steps=2, style="mixed", term_weights=EVEN, batch_size=4),
    ),
)


def test_two_runs_give_the_same_numbers():
    state = torch.get_rng_state()
    first, second = warm_started_policy(SHORT), warm_started_policy(SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)
    start = untrained_policy(seed=3)
    assert not torch.equal(first.lm_head.weight, start.lm_head.weight)


def test_training_lowers_the_loss():
    phase = Phase(steps=12, style="careful", term_weights=EVEN, warmup_steps=1, decay_share=0.0,
                  batch_size=16, curriculum_steps=100)  # fmt: skip
    ids, mask = batch_tensors(phase_batch(phase, 9, 0), load_tokenizer())
    before = imitation_loss(untrained_policy(), ids, mask)
    after = imitation_loss(warm_started_policy(WarmStart(phases=(phase,))), ids, mask)
    assert after < before - 0.5


def test_imitation_loss_reads_masked_tokens_only():
    model, tokenizer = untrained_policy().eval(), load_tokenizer()
    lines = [CorpusLine("a-0?1>", "a-0=1"), CorpusLine("a-0b-1c+2?1>", "a-0=1b-1=0c+2=2")]
    ids, mask = batch_tensors(lines, tokenizer)
    total, count = 0.0, 0
    for line in lines:
        row = tokenizer(line.prompt + line.completion, return_tensors="pt").input_ids
        row = torch.cat([row, torch.tensor([[1]])], dim=1)
        log_probs = model(row).logits.double().log_softmax(-1)
        for position in range(len(line.prompt), row.shape[1]):
            total -= log_probs[0, position - 1, row[0, position]].item()
            count += 1
    assert int(mask.sum()) == count
    torch.testing.assert_close(imitation_loss(model, ids, mask).item(), total / count)


def test_the_curriculum_widens_and_stays_on_training_prompts():
    phase = Phase(steps=100, style="careful", term_weights=EVEN, curriculum_steps=5, batch_size=64)
    for step, most, digits in ((0, 3, "01"), (5, 4, "012"), (60, 14, "0123456789")):
        lines = phase_batch(phase, 0, step)
        terms = [line.prompt.split("?")[0] for line in lines]
        assert max(len(x) // 3 for x in terms) == most
        assert {c for x in terms for c in x if c.isdigit()} == set(digits)
        assert not any(held_out(line.prompt) for line in lines)


def test_learning_rate_warms_up_and_decays():
    phase = Phase(steps=100, style="careful", term_weights=EVEN, warmup_steps=10)
    factors = [learning_rate_factor(phase, step) for step in range(100)]
    assert factors[:10] == [(step + 1) / 10 for step in range(10)]
    assert set(factors[10:60]) == {1.0}
    assert factors[60:] == sorted(factors[60:], reverse=True) and 0 < factors[-1] < 0.05


def test_a_written_policy_loads_again(tmp_path):
    model = warm_started_policy(SHORT)
    write_policy(model, SHORT, tmp_path / "policy")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    for left, right in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(left, right)
    ids = tokenizer("a-0?1>", return_tensors="pt").input_ids
    # A mapped file is aligned otherwise in memory, where a processor may choose another kernel.
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert json.loads(SHORT.to_json())["seed"] == 3
