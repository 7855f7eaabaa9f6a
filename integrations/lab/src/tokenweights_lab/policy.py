"""The embedded policy: a Qwen3 of about 200 thousand parameters that half knows the task."""

from pathlib import Path

import torch
from tokenweights._typing import typed
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tokenweights_lab.tokenizer import VOCABULARY

QUERY_NORM_INIT = 2.0


def policy_config() -> Qwen3Config:
    """The configuration of the policy: 4 layers, width 64, grouped-query attention.

    The initial range of 0.08, four times the usual, suits the small width.

    Returns:
        A fresh configuration.

    Example:
        >>> policy_config().num_hidden_layers
        4
    """
    return Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
        use_cache=True,
        dtype="float32",
    )


def generation_config() -> GenerationConfig:
    """The generation configuration of the policy: where to stop and what to pad with.

    Returns:
        A fresh generation configuration.

    Example:
        >>> generation_config().eos_token_id
        1
    """
    return GenerationConfig(bos_token_id=None, pad_token_id=0, eos_token_id=1)


@typed
def untrained_policy(*, seed: int = 0) -> Qwen3ForCausalLM:
    """The policy before its warm start.

    The weights of the query norms start at 2, which sharpens the first attention patterns. The
    global random state is left as it was.

    Args:
        seed: Seed of the initial weights.

    Returns:
        A float32 model on the CPU.

    Example:
        >>> sum(p.numel() for p in untrained_policy().parameters())
        200384
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(policy_config())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.fill_(QUERY_NORM_INIT)
    model.generation_config = generation_config()
    return model


def policy_path() -> Path:
    """The directory of the embedded policy, for anything that takes a model name or path.

    Returns:
        A directory with `config.json`, the tokenizer's files and `model.safetensors`.

    Example:
        >>> (policy_path() / "config.json").exists()
        True
    """
    return Path(__file__).parent / "policy"


@typed
def load_policy(
    *, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> Qwen3ForCausalLM:
    """A fresh copy of the embedded, warm-started policy.

    Args:
        dtype: Type of the parameters; the file holds float32.
        attn_implementation: Attention backend of transformers, such as `sdpa` or `eager`.

    Returns:
        The model on the CPU, in evaluation mode.

    Example:
        >>> load_policy().config.num_hidden_layers
        4
    """
    return Qwen3ForCausalLM.from_pretrained(
        policy_path(), dtype=dtype, attn_implementation=attn_implementation, local_files_only=True
    )


def load_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the embedded policy, from its files.

    Returns:
        The same tokenizer as `character_tokenizer()`.

    Example:
        >>> load_tokenizer().pad_token
        '<pad>'
    """
    return PreTrainedTokenizerFast.from_pretrained(policy_path(), local_files_only=True)
