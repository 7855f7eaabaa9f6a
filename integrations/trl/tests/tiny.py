"""A tiny Qwen3 policy, a character tokenizer and a prompt set for the tests, all made in code."""

from contextlib import contextmanager

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ALPHABET = "0123456789+-=?boxed\\{} "
PROMPTS = ["1+2=", "10+23=", "4-1=?", "7=", "12-10+3=", "5+5=", "3+0=", "9-8+7-6="]


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *dict.fromkeys(ALPHABET)]
    vocabulary = {word: index for index, word in enumerate(words)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def policy(layers: int = 4, **changes) -> Qwen3ForCausalLM:
    """Weights wide enough (standard deviation 0.2) that attention rows are far from uniform."""
    settings = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(7)
    return Qwen3ForCausalLM(Qwen3Config(**(settings | changes)))


@contextmanager
def biased_logits(model, bias):
    """A context in which one generation of the model has a bias of `batch step vocab` on logits."""
    step = iter(range(bias.shape[1]))
    hook = model.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits + bias[:, None, next(step)]
    )
    try:
        yield
    finally:
        hook.remove()


def reward(completion_ids, **_) -> list[float]:
    """A reward that any two different completions are unlikely to share."""
    return [float(sum(i * c for i, c in enumerate(ids, 1)) % 11) for ids in completion_ids]


def arguments(config_class, folder, **changes):
    """Two optimizer steps of two micro-batches of four responses, two prompts a step."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 10,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return config_class(**(settings | changes))


def trainer(trainer_class, config_class, folder, *, model=None, rollout_func=None, **changes):
    return trainer_class(
        model if model is not None else policy(),
        reward,
        arguments(config_class, folder, **changes),
        Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer(),
        rollout_func=rollout_func,
    )
