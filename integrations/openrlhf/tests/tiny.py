"""A tiny policy, hand-made rollouts, and OpenRLHF's own trainer around them."""

import os
import sys
from pathlib import Path

import ray
import torch
from openrlhf.trainer.ppo_trainer import BasePPOTrainer
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from openrlhf.trainer.ray.launcher import RayActorGroup
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
from openrlhf.utils import config as openrlhf_config
from openrlhf.utils import get_strategy
from tokenweights import TokenWeightsConfig
from tokenweights_lab import load_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from tokenweights_openrlhf import TokenWeightsMixin, TokenWeightsPolicyActor
from tokenweights_openrlhf.config import checked_arguments
from tokenweights_openrlhf.train import COMMAND
from tokenweights_openrlhf.trainer import substituted

HERE = Path(__file__).parent
_INHERITED = os.environ.get("PYTHONPATH", "").split(os.pathsep)
# Other processes run the code that this one runs.
PYTHONPATH = (str(HERE), str(HERE / "stand_ins"), *filter(None, _INHERITED))
PROMPTS, SAMPLES = 4, 4
# A step of Adam with these settings is the gradient itself, up to a relative error of |g| / 1e6.
PLAIN_GRADIENT_STEP = (
    *("--actor.adam.lr", "1e6", "--actor.adam.eps", "1e6", "--actor.adam.betas", "0", "0"),
    *("--actor.lr_scheduler", "constant", "--actor.lr_warmup_ratio", "0", "--actor.max_norm", "0"),
)
WeightedActor = ray.remote(num_gpus=1)(TokenWeightsPolicyActor)


def save_policy(folder, layers=3, experts=0):
    """Weights wide enough (standard deviation 0.2) that attention rows are far from uniform."""
    tokenizer = load_tokenizer()
    torch.manual_seed(7)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    if experts:
        routed = {"num_experts": experts, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
        shared = config.to_dict() | {"model_type": "qwen3_moe"}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig.from_dict(shared | routed))
    else:
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Parsed(Exception):
    pass


def parsed(*options):
    """OpenRLHF's arguments for a command line, from its own parser, before its checks."""
    import runpy

    def stop(arguments):
        raise Parsed(hierarchize(arguments))

    hierarchize = openrlhf_config.hierarchize
    with (
        substituted(openrlhf_config, "hierarchize", stop),
        substituted(sys, "argv", [COMMAND, *map(str, options)]),
    ):
        try:
            runpy.run_module(COMMAND, run_name="__main__")
        except Parsed as found:
            return found.args[0]


def arguments(policy, *options, ranks=1, recipe=None, packed=False):
    made = parsed(
        *("--actor.model_name_or_path", policy, "--actor.num_gpus_per_node", ranks),
        *("--algo.advantage.estimator", "group_norm", "--algo.kl.init_coef", 0),
        *("--rollout.batch_size", PROMPTS, "--rollout.n_samples_per_prompt", SAMPLES),
        *("--train.batch_size", PROMPTS * SAMPLES, "--train.micro_batch_size", 2),
        *("--rollout.micro_batch_size", 2, "--train.max_tokens_per_gpu", 64),
        *("--ds.attn_implementation", "sdpa", "--vllm.num_engines", 0),
        *PLAIN_GRADIENT_STEP,
        *options,
    )
    made.ds.param_dtype = "fp32"  # the command line knows bf16 and fp16 only
    made.ds.packing_samples = packed  # the command line would ask for flash attention
    made.actor.eps_clip_low_high = (0.2, 0.28)
    made.critic.model_name_or_path = None
    made.rollout.max_tokens_per_gpu = 64
    if recipe is not None:
        checked_arguments(made, TokenWeightsConfig(recipe))
    return made


def actor_group(actor_class, ranks, ring):
    return RayActorGroup(1, ranks, actor_class, num_gpus_per_actor=1, duplicate_actors=ring)


def responses(seed=0, sampled=False):
    """Prompts of 3 to 6 tokens; responses of 1 to 12, some of them in two turns; a reward each.

    With `sampled` they have the engine's log-probabilities, which are anything here.
    """
    draw = torch.Generator().manual_seed(seed)
    log_probs = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    for prompt in range(PROMPTS):
        start = [number(2, 40) for _ in range(number(3, 6))]
        for _ in range(SAMPLES):
            length = number(1, 12)
            tokens = start + [number(2, 40) for _ in range(length)]
            ranges = [(len(start), len(tokens))]
            if length > 6:  # a tool's answer in the middle
                ranges = [(len(start), len(start) + 2), (len(start) + 4, len(tokens))]
            reward = float(number(-4, 4))
            yield {
                "prompt": f"prompt {prompt}",
                "label": "",
                "reward": reward,
                "scores": reward,
                "observation_tokens": tokens,
                "action_ranges": ranges,
                "rollout_log_probs": (-7 * torch.rand(len(tokens), generator=log_probs)).tolist()
                if sampled
                else None,
            }


def rollouts(args, seed=0):
    generator = SamplesGenerator(get_strategy(args), None, None, None, [])
    sampled = args.algo.advantage.is_correction_level != "off"
    made = responses(seed, sampled)
    return [generator._process_response_into_experience(response) for response in made]


class PlainTrainer(BasePPOTrainer):
    """OpenRLHF's trainer as it is; the real ones add a source of rollouts."""


class WeightedTrainer(TokenWeightsMixin, BasePPOTrainer):
    """The same with token weights."""


def trained(actors, args, *, steps=1, first_step=0, trainer_class=None, reference=None):
    """The status of each step, and the parameters after the last, of plain or weighted training."""
    weighted = hasattr(args, "tokenweights")
    actor_class = WeightedActor if weighted else PolicyModelActor
    trainer_class = trainer_class or (WeightedTrainer if weighted else PlainTrainer)
    group = actors(actor_class, args.actor.num_gpus_per_node, args.ds.ring_attn_size)
    strategy = get_strategy(args)
    ray.get(group.async_init_model_from_pretrained(strategy, args.actor.model_name_or_path, 10))
    trainer = trainer_class(strategy, group, None, None, reference, None, load_tokenizer())
    statuses = []
    for step in range(first_step, first_step + steps):
        status, _ = trainer.train_step(rollouts(args, seed=step - first_step), step)
        statuses.append(status)
    states = ray.get([actor.__ray_call__.remote(parameters) for actor in group._actor_handlers])
    return statuses, states[0]


def parameters(actor):
    """Called in an actor's process: its policy's parameters, gathered where they are sharded."""
    import deepspeed

    state = {}
    for name, parameter in actor.actor.model.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            state[name] = parameter.detach().clone()
    return state
