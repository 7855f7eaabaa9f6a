"""Training from the command line: `python -m tokenweights_openrlhf.train --help`.

The command line is that of `openrlhf.cli.train_ppo_ray`, and `--tokenweights.*`. OpenRLHF's command
has no hook for other classes, so its own module is run, and for as long as it runs four names that
it looks up stand for classes of this package.
"""

import argparse
import runpy
import sys
from dataclasses import fields
from typing import Any

import ray
from openrlhf.trainer import ppo_trainer, ppo_trainer_async
from openrlhf.trainer.ray import ppo_actor
from openrlhf.utils import config as openrlhf_config
from tokenweights import TokenWeightsConfig
from tokenweights._errors import TokenWeightsError
from tokenweights.recipes import require_version
from tokenweights.report import write_run_json

from tokenweights_openrlhf.config import checked_arguments
from tokenweights_openrlhf.probe import GradientProbePolicyActor
from tokenweights_openrlhf.scores import TokenWeightsPolicyActor
from tokenweights_openrlhf.trainer import (
    TokenWeightsPPOTrainer,
    TokenWeightsPPOTrainerAsync,
    substituted,
)

PROGRAM = "python -m tokenweights_openrlhf.train"
COMMAND = "openrlhf.cli.train_ppo_ray"


def main(argv: list[str] | None = None) -> None:
    """Runs OpenRLHF's training command with token weights."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(PROGRAM, allow_abbrev=False, add_help=False)
    add = parser.add_argument_group("token weights").add_argument
    prefix = "tokenweights."
    for option in fields(TokenWeightsConfig):
        default = "" if option.default is None else f" ({option.default})"
        text, kind = option.metadata["help"] + default, option.metadata["type"]
        add(f"--{prefix}{option.name}", type=kind, default=option.default, help=text)
    options, rest = parser.parse_known_args(argv)
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        print(f"\nall options of {COMMAND}:\n")
        _run(rest, None)
    try:
        require_version("openrlhf", "0.11.2", "0.12")
        values = {name.removeprefix(prefix): value for name, value in vars(options).items()}
        _run(rest, TokenWeightsConfig(**values))
    except TokenWeightsError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def _run(argv: list[str], config: Any) -> None:
    """OpenRLHF's command, with this package's classes in place of its own."""
    hierarchize = openrlhf_config.hierarchize

    def hierarchize_and_check(arguments: Any) -> Any:
        checked = checked_arguments(hierarchize(arguments), config)
        model, data = checked.actor.model_name_or_path, checked.data.prompt_dataset
        seed = checked.train.seed
        write_run_json(config, trainer="openrlhf", model=model, data=str(data), seed=seed)
        return checked

    probed = config is not None and config.gradient_probe_steps is not None
    actor_class = GradientProbePolicyActor if probed else TokenWeightsPolicyActor
    with (
        substituted(sys, "argv", [COMMAND, *argv]),
        substituted(openrlhf_config, "hierarchize", hierarchize_and_check),
        substituted(ppo_actor, "PolicyModelActor", ray.remote(num_gpus=1)(actor_class)),
        substituted(ppo_trainer, "PPOTrainer", ray.remote(TokenWeightsPPOTrainer)),
        substituted(ppo_trainer_async, "PPOTrainerAsync", ray.remote(TokenWeightsPPOTrainerAsync)),
    ):
        runpy.run_module(COMMAND, run_name="__main__")


if __name__ == "__main__":
    main()
