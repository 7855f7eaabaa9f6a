"""What the adapter needs of VeRL beyond its documentation.

A failure here names what has changed; the adapter's code has to follow.
"""

import inspect
import re

import pytest
from verl.experimental.separation.engine_workers import DetachActorWorker
from verl.trainer.distillation import losses as distillation
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.trainer.ppo.v1 import agent_loop_tq
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import fsdp_utils
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils.padding import build_attention_mask_from_nested, response_to_nested

from tokenweights_verl.config import LOSS_MODES, TOKEN_MEAN_LOSS_MODES
from tokenweights_verl.scores import COLUMNS

pytestmark = pytest.mark.versions

SIGNATURES = [
    (PPOTrainerSync.__init__, ["self", "config"]),
    (PPOTrainerSync._init_tokenizer, ["self"]),
    (PPOTrainerSync._init_resource_pool_mgr, ["self"]),
    (PPOTrainerSync._compute_old_log_prob, ["self", "batch", "metrics"]),
    (PPOTrainerSync._compute_advantage, ["self", "batch", "metrics"]),
    (PPOTrainerSync._compute_metrics, ["self", "batch", "metrics"]),
    (PPOTrainerSync.step, ["self", "metrics", "timing_raw"]),
    (
        FSDPEngineWithLMHead.forward_step,
        ["self", "micro_batch", "loss_function", "forward_only"],
    ),
    (
        FSDPEngineWithLMHead.prepare_model_outputs,
        ["self", "output", "output_args", "micro_batch"],
    ),
    (FSDPEngineWithLMHead._gather_and_unpad_packed, ["self", "tensor", "pad_size"]),
    (TrainingWorker.__init__, ["self", "config"]),
    (EngineRegistry.register, ["model_type", "backend", "device"]),
    (prepare_micro_batches, ["data", "dp_group"]),
    (build_attention_mask_from_nested, ["input_ids"]),
    (response_to_nested, ["tensor", "response_mask"]),
    (tu.get_non_tensor_data, ["data", "key", "default"]),
]


def test_signatures():
    taken = {function: list(inspect.signature(function).parameters) for function, _ in SIGNATURES}
    changed = {f.__qualname__ for f, names in SIGNATURES if taken[f][: len(names)] != names}
    assert changed == set()


def test_every_trainer_has_the_seams_of_the_synchronous_one():
    for function, names in SIGNATURES:
        if function.__qualname__.startswith("PPOTrainer"):
            for trainer in (PPOTrainerColocateAsync, PPOTrainerSeparateAsync):
                own = inspect.signature(getattr(trainer, function.__name__))
                assert list(own.parameters)[: len(names)] == names


def test_the_worker_that_keeps_older_weights_is_an_actor_worker():
    assert issubclass(DetachActorWorker, ActorRolloutRefWorker)
    assert "__init__" in vars(DetachActorWorker)


def test_the_actor_worker_names_the_class_of_its_actor():
    assert "actor_worker_cls" in vars(ActorRolloutRefWorker)


def test_older_weights_of_offloaded_parameters_are_no_copies():
    """So bringing some back overwrites the rest, and this is refused; FSDP1 copies."""
    source = inspect.getsource(fsdp_utils.fsdp2_sharded_save_to_cpu)
    assert ".detach().cpu()" in source and "copy=True" not in source
    assert "_local_tensor.copy_(" in inspect.getsource(fsdp_utils.fsdp2_sharded_load_from_cpu)
    assert "copy=True" in inspect.getsource(fsdp_utils.fsdp1_sharded_save_to_cpu)


def test_parameters_that_are_always_offloaded_are_on_the_cpu_with_fsdp2_alone():
    """FSDP1 has no such thing for what it trains."""
    source = inspect.getsource(FSDPEngineWithLMHead._build_fsdp_module)
    first, second = source.split('strategy == "fsdp2"')
    assert "offload_policy" not in first and "CPUOffload(" in first
    assert "if self.engine_config.offload_policy or self.engine_config.forward_only:" in second
    assert "CPUOffloadPolicy(pin_memory=True)" in second


@pytest.mark.parametrize("mode", LOSS_MODES)
def test_a_loss_divides_as_loss_agg_mode_says_or_the_recipe_has_to_divide_by_all_tokens(mode):
    """`sapo` is a mean over sequences of means over tokens, whatever the setting."""
    found = re.findall(r'loss_agg_mode=([\w"-]+)', inspect.getsource(get_policy_loss_fn(mode)))
    obeys = mode in TOKEN_MEAN_LOSS_MODES
    assert found == ["loss_agg_mode" if obeys else '"seq-mean-token-mean"']


def test_an_engine_keeps_what_it_autocasts_to():
    assert "self._autocast_dtype = param_dtype" in inspect.getsource(FSDPEngineWithLMHead.__base__)


def test_the_trainer_weights_what_it_trains_on():
    """Advantages are written between VeRL's own and the update of the actor."""
    source = inspect.getsource(PPOTrainerSync._step_once)
    old, made = source.index("_compute_old_log_prob("), source.index("_compute_advantage(")
    assert old < made < source.index("_update_actor(")


def test_the_policy_is_frozen_until_its_first_update():
    """Steps count from 1, and the one that `critic_warmup` names updates the policy."""
    update = "if self.config.trainer.critic_warmup <= self.global_steps:"
    once = inspect.getsource(PPOTrainerSync._step_once)
    assert once.count("_update_actor(") == 1
    assert once.index(update) < once.index("_update_actor(")
    before, loop = inspect.getsource(PPOTrainerSync.fit).split("while current_epoch", 1)
    assert before.count("self.global_steps += 1") == loop.count("self.global_steps += 1") == 1
    assert loop.index("self.step(") < loop.index("self.global_steps += 1")
    assert "self.global_steps = 0" in inspect.getsource(PPOTrainerSync.__base__)


def test_outputs_are_made_by_keyword():
    source = inspect.getsource(FSDPEngineWithLMHead.forward_step)
    assert "output_args=output_args, micro_batch=micro_batch" in source


def test_the_columns_of_a_rollout_batch_have_these_names():
    old, made = (
        inspect.getsource(method)
        for method in (PPOTrainerSync._compute_old_log_prob, PPOTrainerSync._compute_advantage)
    )
    # The entropy is there whatever the settings; where `bypass_mode` leaves it out, it is refused.
    assert '"calculate_entropy": True' in old and 'select("old_log_probs", "entropy")' in old
    reference = inspect.getsource(PPOTrainerSync._compute_ref_log_prob)
    assert 'data.select("ref_log_prob")' in reference
    for field in ("rm_scores", "rollout_log_probs", "old_log_probs", "ref_log_prob"):
        assert field in COLUMNS.values() and f'"{field}"' in made
    assert 'keys.append(f"{uid}_{session_id}_{i}")' in inspect.getsource(agent_loop_tq)


def test_a_distillation_without_task_rewards_has_no_policy_loss():
    assert "policy_loss = 0.0" in inspect.getsource(distillation)
