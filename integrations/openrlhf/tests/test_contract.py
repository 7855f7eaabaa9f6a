"""What the adapter needs of OpenRLHF and Ray beyond their documentation.

A failure here names what has changed; the adapter's code has to follow.
"""

import ast
import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
import ray
from deepspeed import DeepSpeedEngine
from deepspeed.utils import get_z3_leaf_modules
from openrlhf.models import Actor
from openrlhf.models.ring_attn_utils import gather_and_pad_tensor
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from openrlhf.trainer.ray.launcher import RayActorGroup
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor
from openrlhf.utils.utils import zero_pad_sequences
from tokenweights import TokenWeightsError

from tokenweights_openrlhf.scores import COLUMNS, plain_class
from tokenweights_openrlhf.train import COMMAND

pytestmark = pytest.mark.versions

ACTOR_CLASSES = [
    PolicyModelActor,
    ppo_trainer.PPOTrainer,
    ppo_trainer_async.TrainingActor,
    ppo_trainer_async.PPOTrainerAsync,
]


@pytest.mark.parametrize("actor_class", ACTOR_CLASSES, ids=lambda found: found.__ray_metadata__)
def test_ray_keeps_the_class_of_an_actor_class(actor_class):
    found = plain_class(actor_class)
    assert inspect.isclass(found)
    assert found.__module__.startswith("openrlhf.")


def test_a_class_that_is_kept_elsewhere_is_an_error_with_the_versions():
    with pytest.raises(TokenWeightsError, match=r"openrlhf>=0\.11\.2,<0\.12 and the ray it pins"):
        plain_class(object())


def test_a_subclass_of_the_plain_class_becomes_an_actor_class():
    derived = type("Derived", (plain_class(PolicyModelActor),), {})
    assert plain_class(ray.remote(derived)) is derived


SIGNATURES = [
    (plain_class(PolicyModelActor).init_model_from_pretrained, ["self", "strategy", "pretrain"]),
    (
        plain_class(PolicyModelActor).forward,
        ["self", "sequences", "action_mask", "attention_mask"],
    ),
    (ppo_trainer.BasePPOTrainer.train_step, ["self", "rollout_samples", "global_step"]),
    (ppo_trainer.BasePPOTrainer.ppo_train, ["self", "global_steps"]),
    (RemoteExperienceMaker.make_experience, ["self", "samples_list"]),
    (RemoteExperienceMaker.compute_advantages_and_returns, ["self", "experiences"]),
    (RemoteExperienceMaker._flatten_results, ["self", "refs", "duplicate_factor"]),
    (RayActorGroup.async_run_method, ["self", "method_name"]),
    (RayActorGroup.async_run_method_batch, ["self", "method_name"]),
    (DeepSpeedEngine.empty_partition_cache, ["self"]),
    (get_z3_leaf_modules, ["model"]),
    (zero_pad_sequences, ["sequences", "side", "value"]),
    (
        gather_and_pad_tensor,
        ["tensor", "ring_attn_group", "ring_attn_pad_len", "indices", "batch", "seqlen"],
    ),
]


@pytest.mark.parametrize(
    ("function", "names"), SIGNATURES, ids=lambda value: getattr(value, "__qualname__", "")
)
def test_signatures(function, names):
    found = list(inspect.signature(function).parameters)
    assert found[: len(names)] == names, f"{function.__qualname__} takes {found}"


def test_the_actor_can_be_asked_for_entropies():
    names = inspect.signature(Actor.forward).parameters
    assert {"return_output", "return_entropy"} <= set(names)
    assert 'setattr(output, "entropy"' in inspect.getsource(Actor.forward)


def test_an_experience_has_the_fields_that_are_read():
    fields = {*COLUMNS.values(), "action_mask", "attention_mask", "index", "prompts"}
    assert fields <= set(Experience.__dataclass_fields__)
    # Log-probabilities are of response tokens, one less than the sequence's: the prompt is masked.
    assert [name for name in COLUMNS.values() if not Experience.is_step_tensor_field(name)] == [
        "rewards"
    ]


def test_a_rollout_has_the_responses_to_a_prompt_together():
    """Also with dynamic filtering, which drops or keeps a prompt, and where a rollout is cut."""
    source = inspect.getsource(SamplesGenerator._generate_vllm)
    assert "accepted_experiences.extend(experiences)" in source
    assert "for response in ray.get(ref)" in source
    source = inspect.getsource(SamplesGenerator.generate_samples)
    assert "self.args.rollout.batch_size * self.args.rollout.n_samples_per_prompt" in source
    assert "self._sample_buffer[:chunk_size]" in source
    source = inspect.getsource(RemoteExperienceMaker.compute_advantages_and_returns)
    assert "rewards.reshape(-1, args.rollout.n_samples_per_prompt)" in source


def test_engines_are_asked_for_log_probabilities_only_with_a_correction():
    source = inspect.getsource(SamplesGenerator._dispatch_prompts_to_vllm)
    asked = 'logprobs=1 if self.args.algo.advantage.is_correction_level != "off" else None'
    assert asked in source


def test_log_probabilities_of_the_reference_are_kept_with_the_kl_loss_only():
    source = inspect.getsource(RemoteExperienceMaker.make_experience)
    assert "if not args.algo.kl.use_loss:\n                base_action_log_probs = None" in source
    assert (
        "if args.algo.kl.init_coef > 0:\n        ref_model"
        in Path(find_spec(COMMAND).origin).read_text()
    )


def test_the_trainer_looks_its_experience_maker_up_when_it_starts():
    start = ppo_trainer.BasePPOTrainer.__init__
    assert "RemoteExperienceMaker" in start.__code__.co_names
    assert start.__globals__ is vars(ppo_trainer)
    source = inspect.getsource(start)
    assert "self.experience_maker = RemoteExperienceMaker(" in source
    assert "self.actor_model_group = " in source


def test_the_trainer_makes_experiences_before_it_balances_and_hands_them_out():
    source = inspect.getsource(ppo_trainer.BasePPOTrainer.train_step)
    made = source.index("self.experience_maker.make_experience_batch(")
    assert made < source.index("balance_experiences(") < source.index('method_name="append"')


def test_the_trainer_trains_before_it_wakes_the_engines():
    source = inspect.getsource(ppo_trainer.BasePPOTrainer.train_step)
    assert source.index("self.ppo_train(global_step)") < source.index("self.broadcast_to_vllm(")


def test_the_policy_is_frozen_up_to_the_step_that_is_named():
    """Steps count from 0; what a frozen policy was rolled out to is kept until it trains."""
    source = inspect.getsource(ppo_trainer.BasePPOTrainer.ppo_train)
    assert "run_actor = global_steps > self.args.critic.freezing_steps and" in source
    source = inspect.getsource(ppo_trainer.BasePPOTrainer.train_step)
    assert source.index('method_name="append"') < source.index("self.ppo_train(global_step)")
    assert "return status, global_step + 1" in source
    assert "replay_buffer.clear()" in inspect.getsource(plain_class(PolicyModelActor).fit)
    assert "clear(" not in inspect.getsource(plain_class(PolicyModelActor).append)
    source = inspect.getsource(ppo_trainer.BasePPOTrainer.init_checkpoint_states)
    assert '"global_step": 0' in source


def test_the_policy_makes_one_pass_for_old_log_probabilities():
    """And nothing else calls its `forward`, so that scores and experiences stay in step."""
    source = inspect.getsource(RemoteExperienceMaker.make_experience)
    assert source.count("self.actor_model_group") == 1
    assert inspect.getsource(RemoteExperienceMaker).count('"forward"') == 1


def test_the_asynchronous_trainer_looks_its_training_half_up_when_it_starts():
    start = inspect.unwrap(plain_class(ppo_trainer_async.PPOTrainerAsync).__init__)
    assert "TrainingActor" in start.__code__.co_names
    assert start.__globals__ is vars(ppo_trainer_async)


def test_the_command_looks_up_the_names_that_are_substituted():
    source = Path(find_spec(COMMAND).origin).read_text()
    imports = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    for name in (
        ("openrlhf.trainer.ray.ppo_actor", "PolicyModelActor"),
        ("openrlhf.trainer.ppo_trainer", "PPOTrainer"),
        ("openrlhf.trainer.ppo_trainer_async", "PPOTrainerAsync"),
        ("openrlhf.utils.config", "hierarchize"),
    ):
        assert name in imports, f"{COMMAND} does not import {name}"
