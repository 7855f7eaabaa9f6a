"""What is refused, by name, and what that rests on."""

import pytest
import torch
from configured import composed
from omegaconf import OmegaConf
from tokenweights import TokenWeightsError
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.trainer.ppo.utils import Role
from verl.workers.config import FSDPActorConfig, FSDPOptimizerConfig, PolicyLossConfig

from tokenweights_verl.config import LOSS_MODES, token_weights_config
from tokenweights_verl.engine import TokenWeightsWorker
from tokenweights_verl.trainer import TokenWeightsTrainerSeparateAsync, TokenWeightsTrainerSync

pytestmark = pytest.mark.versions

ACTOR = "actor_rollout_ref.actor"
PROBED = ["token_weights.gradient_probe_steps=5", f"{ACTOR}.strategy=fsdp"]
REFUSED = {
    "low2hihg": (["token_weights.recipe=low2hihg"], "low2high"),
    "unknown key": (["+token_weights.record=x"], "token_records"),
    "no recipe": (["token_weights.recipe=null"], "a recipe name"),
    "loss magnitude": (["token_weights.recipe=loss_low20"], "predictive_low20"),
    "records without entropies": (
        ["token_weights.recipe=full", "token_weights.token_records=x.jsonl"],
        "token_records",
    ),
    "no steps": (["token_weights.token_records_steps=0"], ">= 1"),
    "no probe steps": (["token_weights.gradient_probe_steps=0"], "gradient_probe_steps"),
    "flat shards of slices": (
        [*PROBED, f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2"],
        "ulysses_sequence_parallel_size",
    ),
    "flat shards of a part": ([*PROBED, f"{ACTOR}.fsdp_config.fsdp_size=8"], "fsdp_size"),
    "a probe of prefixes": (
        [*PROBED, "token_weights.recipe=full", f"{ACTOR}.use_prefix_grouper=true"],
        "use_prefix_grouper",
    ),
    "a probe of offloaded activations": (
        [
            "token_weights.gradient_probe_steps=5",
            "actor_rollout_ref.model.enable_activation_offload=true",
        ],
        "enable_activation_offload",
    ),
    "distillation alone": (
        [
            "distillation.enabled=true",
            "distillation.distillation_loss.use_task_rewards=false",
        ],
        "use_task_rewards",
    ),
    "kl_cov": ([f"{ACTOR}.policy_loss.loss_mode=kl_cov"], "loss_mode"),
    "clip_cov": ([f"{ACTOR}.policy_loss.loss_mode=clip_cov"], "loss_mode"),
    "geo_mean": ([f"{ACTOR}.policy_loss.loss_mode=geo_mean"], "loss_mode"),
    "bypass": (["algorithm.rollout_correction.bypass_mode=true"], "bypass_mode"),
    "prefixes": ([f"{ACTOR}.use_prefix_grouper=true"], "use_prefix_grouper"),
    "selected tokens, sequence mean": (
        ["token_weights.recipe=anchor20", f"{ACTOR}.loss_agg_mode=seq-mean-token-sum"],
        "token-mean",
    ),
    "selected tokens, sequence mean of sapo": (
        ["token_weights.recipe=anchor20", f"{ACTOR}.policy_loss.loss_mode=sapo"],
        "loss_mode` one of vanilla, dppo_tv, dppo_kl, gspo, gpg, cispo, got 'sapo'. The recipe "
        "divides by selected_tokens",
    ),
    "selected tokens, rejected ones": (
        ["token_weights.recipe=anchor20", "algorithm.rollout_correction.rollout_rs=token_k1"],
        "rollout_rs",
    ),
    "slices without flash attention": (
        [
            f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2",
            "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        ],
        "flash attention",
    ),
    "the old trainer": (["trainer.use_v1=false"], "use_v1"),
    "a plain trainer": (["trainer.v1.trainer_mode=sync"], "tokenweights_sync"),
    "a trainer that there is not": (
        ["trainer.v1.trainer_mode=tokenweights_fully_async"],
        "`trainer.v1.trainer_mode` one of tokenweights_sync",
    ),
    "older weights of offloaded parameters": (
        [
            "trainer.v1.trainer_mode=tokenweights_separate_async",
            f"{ACTOR}.fsdp_config.param_offload=true",
            f"{ACTOR}.strategy=fsdp2",
        ],
        "`trainer.v1.separate_async.parameter_sync_step` one of 1, got 4",
    ),
    "older weights of parameters that are always offloaded": (
        [
            "trainer.v1.trainer_mode=tokenweights_separate_async",
            f"{ACTOR}.fsdp_config.offload_policy=true",
            f"{ACTOR}.strategy=fsdp2",
        ],
        "`trainer.v1.separate_async.parameter_sync_step` one of 1, got 4",
    ),
    "VeOmni": (["model_engine=veomni"], "strategy"),
    "a probe of Megatron": (
        ["model_engine=megatron", "token_weights.gradient_probe_steps=5"],
        "`actor_rollout_ref.actor.strategy` one of fsdp, fsdp2, got 'megatron'",
    ),
    "columns of Megatron": (
        ["model_engine=megatron", "token_weights.recipe=preplan_anchor40"],
        "`actor_rollout_ref.actor.strategy` one of fsdp, fsdp2, got 'megatron'",
    ),
    "fused kernels of Megatron": (
        ["model_engine=megatron", "actor_rollout_ref.model.use_fused_kernels=true"],
        "use_fused_kernels",
    ),
    "later tokens of Megatron": (
        ["model_engine=megatron", "actor_rollout_ref.model.mtp.enable=true"],
        "mtp.enable",
    ),
    "context parallelism of any size": (
        ["model_engine=megatron", f"{ACTOR}.megatron.dynamic_context_parallel=true"],
        "dynamic_context_parallel",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    overrides, named = REFUSED[case]
    with pytest.raises(TokenWeightsError, match=named):
        token_weights_config(composed(*overrides))


def test_megatron_is_taken():
    assert token_weights_config(composed("model_engine=megatron")).token_recipe.attention


def test_sapo_takes_recipes_that_divide_by_all_tokens():
    assert token_weights_config(composed(f"{ACTOR}.policy_loss.loss_mode=sapo"))


@pytest.mark.parametrize("offloaded", ["param_offload", "offload_policy"])
@pytest.mark.parametrize(
    "kept",
    [
        [f"{ACTOR}.strategy=fsdp"],
        ["trainer.v1.separate_async.parameter_sync_step=1"],
        ["trainer.v1.trainer_mode=tokenweights_colocate_async"],
    ],
)
def test_older_weights_are_refused_only_where_they_would_be_lost(kept, offloaded):
    base = ["trainer.v1.trainer_mode=tokenweights_separate_async", f"{ACTOR}.strategy=fsdp2"]
    assert token_weights_config(composed(*base, f"{ACTOR}.fsdp_config.{offloaded}=true", *kept))


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
def test_a_probe_is_off_unless_asked_for(strategy):
    chosen = f"{ACTOR}.strategy={strategy}"
    assert token_weights_config(composed(chosen)).gradient_probe_steps is None
    slices = f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size=2"
    asked = [chosen, "token_weights.gradient_probe_steps=5"]
    asked += [slices] if strategy == "fsdp2" else []
    found = token_weights_config(composed(*asked))
    assert (found.gradient_probe_steps, found.gradient_probe_tolerance) == (5, None)


def test_the_trainer_refuses_before_anything_starts():
    config = composed("token_weights.recipe=low2hihg")
    with pytest.raises(TokenWeightsError, match="low2high"):
        TokenWeightsTrainerSync(config)
    with pytest.raises(TokenWeightsError, match="a recipe name"):
        token_weights_config(OmegaConf.create({}))


@pytest.mark.parametrize(
    ("settings", "role"),
    [
        ([], Role.ActorRollout),
        ([f"{ACTOR}.use_kl_loss=true"], Role.ActorRolloutRef),
        (["actor_rollout_ref.hybrid_engine=false", f"{ACTOR}.use_kl_loss=true"], Role.Actor),
    ],
)
def test_whoever_trains_has_the_worker_that_gives_scores(settings, role):
    """And nobody else, such as a reference beside it."""
    trainer = TokenWeightsTrainerSeparateAsync.__new__(TokenWeightsTrainerSeparateAsync)
    trainer.config = composed(*settings)
    trainer._enable_hybrid_replicas = bool(trainer.config.actor_rollout_ref.hybrid_engine)
    trainer._init_resource_pool_mgr()
    workers = {
        name: worker.__ray_metadata__.modified_class
        for name, worker in trainer.role_worker_mapping.items()
    }
    assert issubclass(workers.pop(role), TokenWeightsWorker)
    assert (Role.RefPolicy in workers) == (role == Role.Actor)
    assert not any(issubclass(worker, TokenWeightsWorker) for worker in workers.values())


def loss(mode, advantages, weights=None):
    """The gradient of VeRL's loss with respect to the log-probabilities, and its mask."""
    torch.manual_seed(0)
    old = -torch.rand(4, 9)
    log_probs = (old + 0.3 * torch.randn(4, 9)).requires_grad_()
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1, 5:] = False
    config = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        optim=FSDPOptimizerConfig(lr=0.0),
        policy_loss=PolicyLossConfig(loss_mode=mode),
    )
    config.global_batch_info.update(
        dp_size=1, batch_num_tokens=int(mask.sum()), global_batch_size=4
    )
    value, _ = get_policy_loss_fn(mode)(
        old_log_prob=old,
        log_prob=log_probs,
        advantages=advantages,
        response_mask=mask,
        loss_agg_mode="token-mean",
        config=config,
        rollout_is_weights=weights,
    )
    return torch.autograd.grad(value, log_probs)[0]


@pytest.mark.parametrize("mode", LOSS_MODES)
def test_weighting_advantages_is_weighting_token_losses(mode):
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(4, 1, generator=generator).expand(4, 9).contiguous()
    weights = torch.rand(4, 9, generator=generator) * (torch.rand(4, 9, generator=generator) > 0.3)
    # VeRL's own importance weights multiply each token's loss, whatever the loss is.
    expected = loss(mode, advantages, weights)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(loss(mode, advantages * weights), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("mode", sorted({"kl_cov", "geo_mean"}))
def test_the_refused_losses_deserve_it(mode):
    assert mode in POLICY_LOSS_REGISTRY and mode not in LOSS_MODES
    generator = torch.Generator().manual_seed(1)
    advantages = torch.randn(4, 1, generator=generator).expand(4, 9).contiguous()
    weights = torch.rand(4, 9, generator=generator)
    weighted, expected = loss(mode, advantages * weights), loss(mode, advantages, weights)
    assert not torch.allclose(weighted, expected, atol=1e-4, rtol=1e-3)
