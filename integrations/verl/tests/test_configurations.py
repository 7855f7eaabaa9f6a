"""Every shipped configuration, against the installed VeRL."""

import re
from importlib.resources import files

import pytest
import tokenweights as tw
import yaml
from configured import composed, with_recipe
from omegaconf import OmegaConf
from test_recipes import REFUSED
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from tokenweights_verl.config import LOSS_MODES, token_weights_config

FOLDER = files("tokenweights_verl.configurations") / "experiment"
NODES = {"qwen3_8b_base": 4, "qwen3_8b_base_selective": 2, "qwen3_14b_base": 4, "qwen2_5_7b": 4}
EXPERIMENTS = tuple(NODES)
PARTS = ("paper", "selective")  # what experiments are composed of
RECIPES = [name for name in tw.recipe_names() if name not in REFUSED]


def test_no_configuration_goes_untested():
    shipped = {path.name.removesuffix(".yaml") for path in FOLDER.iterdir() if ".yaml" in path.name}
    assert shipped == {*PARTS, *EXPERIMENTS}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_it_validates(experiment):
    config = composed(f"+experiment={experiment}")
    assert (config.trainer.nnodes, config.trainer.n_gpus_per_node) == (NODES[experiment], 8)
    validate_config(
        config=config,
        use_reference_policy=need_reference_policy(config),
        use_critic=need_critic(config),
    )
    for part in ("actor_rollout_ref.actor", "actor_rollout_ref.rollout", "algorithm"):
        node = config
        for key in part.split("."):
            node = node[key]
        omega_conf_to_dataclass(node)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (actor.clip_ratio_low, actor.clip_ratio_high) == (0.2, 0.28)
    assert (rollout.n, rollout.temperature, rollout.top_p) == (8, 1.0, 0.95)
    checks = rollout.val_kwargs
    assert (checks.n, checks.temperature, checks.top_p, checks.do_sample) == (8, 1.0, 0.7, True)
    longest = config.data.max_prompt_length + config.data.max_response_length
    ranks = actor.fsdp_config.ulysses_sequence_parallel_size  # VeRL multiplies either limit by it
    assert longest <= ranks * actor.ppo_max_token_len_per_gpu
    assert longest <= ranks * rollout.log_prob_max_token_len_per_gpu
    updates = config.data.train_batch_size // actor.ppo_mini_batch_size
    assert (updates, config.data.train_batch_size % actor.ppo_mini_batch_size) == (16, 0)


@pytest.mark.parametrize("name", [*PARTS, *EXPERIMENTS])
def test_every_key_is_one_that_verl_reads(name):
    def keys(node, above=""):
        for key, value in node.items():
            yield from keys(value, f"{above}{key}.") if isinstance(value, dict) else [above + key]

    written = set(keys(yaml.safe_load((FOLDER / f"{name}.yaml").read_text()))) - {"defaults"}
    known = set(keys(OmegaConf.to_container(composed(), resolve=False)))
    free = ("reward.reward_kwargs.", "actor_rollout_ref.model.override_config.")
    assert not {key for key in written - known if not key.startswith(free)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits(recipe):
    for experiment in EXPERIMENTS:
        config = with_recipe(recipe, f"+experiment={experiment}")
        assert token_weights_config(config).token_recipe == tw.recipe(recipe)


def test_the_selective_experiments_differ_in_data_budget_and_nodes_only():
    full, selective = (
        OmegaConf.to_container(composed(f"+experiment=qwen3_8b_base{family}"), resolve=False)
        for family in ("", "_selective")
    )
    for part, keys in (
        ("data", ("train_files", "val_files")),
        ("trainer", ("nnodes", "total_epochs", "experiment_name")),
    ):
        for key in keys:
            assert full[part].pop(key) != selective[part].pop(key)
    assert full == selective


def test_a_recipe_may_be_its_fields():
    fields = "token_weights.recipe={name: low2high, warmup_steps: 7, layers: [8, 31]}"
    made = token_weights_config(composed("+experiment=qwen3_8b_base", fields)).token_recipe
    assert (made.rule.warmup_steps, made.layers, made.rule.kind) == (7, (8, 31), "endpoints")


@pytest.mark.parametrize("name", [*PARTS, *EXPERIMENTS])
def test_every_value_says_where_it_is_from(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    values = [line for line in lines if re.search(r":\s+[^#\s]", line)]
    assert values and not [line for line in values if not re.search(r"# (paper|DAPO|ours)\b", line)]


def test_the_reward_is_where_the_configuration_says():
    from verl.utils.import_utils import load_extern_object

    place = composed("+experiment=paper").reward.custom_reward_function
    reward = load_extern_object(place.path, place.name)
    texts = ("no box", r"\boxed{8}", r"\boxed{7}")
    for truth in ("7", 7, 7.0):
        rewards = [
            reward(data_source="math", solution_str=text, ground_truth=truth, extra_info={})
            for text in texts
        ]
        assert [found["score"] for found in rewards] == [-2.0, -1.0, 1.0]
        assert [found["acc"] for found in rewards] == [0.0, 0.0, 1.0]
    for truth in ("", None, float("nan"), True):
        with pytest.raises(tw.TokenWeightsError, match="`reference_answer`"):
            reward(data_source="math", solution_str=texts[-1], ground_truth=truth)


def test_known_losses_exist():
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY

    assert set(LOSS_MODES) < set(POLICY_LOSS_REGISTRY)
