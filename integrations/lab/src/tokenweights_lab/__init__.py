"""A synthetic verifiable task and a tiny warm-started policy: all that a first run needs."""

from tokenweights_lab.policy import load_policy, load_tokenizer, policy_config, policy_path
from tokenweights_lab.task import Problem, careful_solution, problem, problems
from tokenweights_lab.tokenizer import character_tokenizer

__all__ = [
    "Problem",
    "careful_solution",
    "character_tokenizer",
    "load_policy",
    "load_tokenizer",
    "policy_config",
    "policy_path",
    "problem",
    "problems",
]
