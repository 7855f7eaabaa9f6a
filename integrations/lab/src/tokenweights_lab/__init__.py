"""A synthetic verifiable task and a tiny warm-started policy: all that a first run needs."""

from tokenweights_lab.evaluation import MAX_COMPLETION_TOKENS, Accuracy, accuracy, completions
from tokenweights_lab.policy import load_policy, load_tokenizer, policy_config, policy_path
from tokenweights_lab.task import Problem, careful_solution, problem, problems
from tokenweights_lab.tokenizer import character_tokenizer

__all__ = [
    "MAX_COMPLETION_TOKENS",
    "Accuracy",
    "Problem",
    "accuracy",
    "careful_solution",
    "character_tokenizer",
    "completions",
    "load_policy",
    "load_tokenizer",
    "policy_config",
    "policy_path",
    "problem",
    "problems",
]
