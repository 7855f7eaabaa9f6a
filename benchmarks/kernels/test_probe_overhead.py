"""What the attention probe adds to a training step: forward and backward, with and without it.

The adapters tap a forward pass that happens anyway, so this ratio is the whole price of the signal.
"""

import statistics
import time

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import tokenweights as tw

LENGTH, RESPONSE, PAIRS = 1024, 768, 7


def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=LENGTH,
        )
    )


def step(policy: Qwen3ForCausalLM, ids: torch.Tensor, probe: bool) -> torch.Tensor | None:
    """One forward and backward pass; the scores of the response tokens if the probe is on."""
    policy.zero_grad(set_to_none=True)
    if not probe:
        policy(ids, labels=ids, use_cache=False).loss.backward()
        return None
    layer = tw.middle_layer(8)
    with tw.capture_attention(policy, [layer], rows=RESPONSE + 1) as capture:
        loss = policy(ids, labels=ids, use_cache=False).loss
    entropy = capture.calls[layer][0].entropy(key_mask=torch.ones_like(ids, dtype=torch.bool))
    loss.backward()
    return tw.align_to_decision(entropy, response_length=RESPONSE)


def seconds(policy: Qwen3ForCausalLM, ids: torch.Tensor, probe: bool) -> float:
    start = time.process_time()
    step(policy, ids, probe)
    return time.process_time() - start


def test_probe_overhead(benchmark):
    policy, ids = model(), torch.randint(0, 512, (2, LENGTH))
    policy.set_attn_implementation("eager")
    layer = tw.middle_layer(8)
    with torch.no_grad():
        weights = policy(ids, output_attentions=True).attentions[layer]
    policy.set_attn_implementation("sdpa")
    expected = tw.attention_entropy_from_weights(weights)[:, -RESPONSE - 1 : -1]
    scores = step(policy, ids, probe=True)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)

    # Pairs, so that a slow spell of the machine hits both sides.
    pairs = [(seconds(policy, ids, False), seconds(policy, ids, True)) for _ in range(PAIRS)]
    ratio = statistics.median(probed / plain for plain, probed in pairs)
    benchmark.extra_info["ratio to the plain step (median of pairs)"] = round(ratio, 4)
    print(f"\nprobed step / plain step: {ratio:.4f}")
    benchmark.pedantic(step, args=(policy, ids, True), rounds=3)
