"""Training from the command line: `python -m tokenweights_trl.train --help`."""

import os
import re
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenweights._errors import TokenWeightsError, invalid, nearest
from tokenweights.commands.models import model_place
from tokenweights.report import write_run_json
from transformers import AutoConfig
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.import_utils import is_torch_bf16_gpu_available
from trl.scripts.utils import TrlParser
from trl.trainer.utils import get_peft_config, get_quantization_config

from tokenweights_trl.arguments import TrainArguments, TrainModelConfig
from tokenweights_trl.callbacks import Interruption, RewardWatch
from tokenweights_trl.config import TokenWeightsGRPOConfig
from tokenweights_trl.data import is_missing_path, training_dataset
from tokenweights_trl.rewards import MATCHES, answer_column, reward_functions
from tokenweights_trl.trainer import TokenWeightsGRPOTrainer

INTERRUPTED = 130  # what a shell says of a program that was interrupted
# How transformers calls models that generate text.
GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
# Files of a run that are written into `output_dir` unless other ones are named.
DEFAULT_FILES = {"metrics_file": "metrics.jsonl", "token_records": "tokens.jsonl"}


def main(argv: list[str] | None = None) -> None:
    """Trains a model by recipe and saves it to `output_dir`."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    words = sys.argv[1:] if argv is None else argv
    parts: Any = (TrainArguments, TokenWeightsGRPOConfig, TrainModelConfig)
    parser = TrlParser(parts)
    parser.set_defaults_with_config(**_of_this_machine())
    try:
        script, training, model = parser.parse_args_and_config(words)
        training.resume_from_checkpoint = checkpoint_of(training)
        trainer = _trainer(script, training, model)
    except Exception as error:  # of this library, or of TRL, transformers, datasets and the Hub
        if {"--log_level", "debug"} <= set(words):
            raise
        parser.exit(2, f"{parser.prog}: error: {_one_line(error, parser)}\n")
    interruption = Interruption()
    trainer.add_callback(interruption)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if trainer.accelerator.is_main_process:
        _say_what_next(training, words, trainer, interrupted=interruption.asked)
    if trainer.accelerator.num_processes > 1:
        # A thread of gloo's may still have to let go of the last collective's tensors, and needs
        # the interpreter for it. A process that ends before it got it hangs or is aborted.
        time.sleep(1.0)
    trainer.accelerator.end_training()
    if interruption.asked:
        sys.exit(INTERRUPTED)


def _of_this_machine() -> dict[str, Any]:
    """Defaults of device and precision, and a line in the log for each rollout batch."""
    found: dict[str, Any] = {"logging_steps": 1}
    if not torch.accelerator.is_available():
        return found | {"use_cpu": True, "bf16": False, "ddp_backend": _backend()}
    return found | {"bf16": is_torch_bf16_gpu_available()}


def _backend() -> str | None:
    return "gloo" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def _one_line(error: Exception, parser: TrlParser) -> str:
    unknown = re.search(r"not used by the HfArgumentParser: \['(--[^'=]+)", str(error))
    if unknown:
        near = nearest(unknown[1], list(parser._option_string_actions))
        meant = f" Did you mean {near}?" if near else ""
        return f"unknown option {unknown[1]}.{meant}"
    words = " ".join(str(error).split())
    return words if isinstance(error, TokenWeightsError) else f"{type(error).__name__}: {words}"


def checkpoint_of(training: TokenWeightsGRPOConfig) -> str | None:
    """The checkpoint to go on from: a path, or `True` for the last one in `output_dir`.

    Args:
        training: Parsed training arguments.

    Returns:
        A directory, or None to start anew.

    Raises:
        TokenWeightsError: If there is no such checkpoint.
    """
    given = training.resume_from_checkpoint
    if given is None or str(given).lower() in ("", "false"):
        return None
    folder = str(training.output_dir)
    if str(given).lower() == "true":
        last = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        if last is None:
            hint = "Leave the option out to start anew."
            condition = "True with a checkpoint in `output_dir`"
            raise invalid("train", "resume_from_checkpoint", condition, f"none in {folder}", hint)
        return last
    if not (Path(given) / "trainer_state.json").is_file():
        hint = "`--resume_from_checkpoint True` takes the last one in `output_dir`."
        raise invalid("train", "resume_from_checkpoint", "a checkpoint", given, hint)
    return str(given)


def _trainer(
    script: TrainArguments, training: TokenWeightsGRPOConfig, model: TrainModelConfig
) -> TokenWeightsGRPOTrainer:
    name = model.model_name_or_path
    if not name:
        hint = "Pass `--model NAME`."
        raise invalid("train", "model_name_or_path", "a path or a name", name, hint)
    if is_missing_path(name):
        raise invalid("train", "model_name_or_path", "a path that exists", name, "Check the path.")
    dataset = training_dataset(script)
    place = model_place(name)
    _require_generator(place, model, trusted=training.trust_remote_code)
    held_out = None
    if training.eval_strategy != "no":
        held_out = training_dataset(script, split=script.dataset_test_split)
    longest = training.max_completion_length
    functions = reward_functions(script, dataset, max_completion_length=longest)
    matched = set(script.reward_funcs or MATCHES) & set(MATCHES)
    column = answer_column(script, list(next(iter(dataset)))) if matched else None
    watch = RewardWatch(functions, column=column)
    settings: Any = training.model_init_kwargs or {}  # TRL has parsed its JSON
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **settings,
    }
    _name_files(training)
    trainer = TokenWeightsGRPOTrainer(
        model=place,
        reward_funcs=watch.functions,
        args=training,
        train_dataset=dataset,
        eval_dataset=held_out,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        callbacks=[watch],
    )
    first = next(iter(dataset))["prompt"]
    if not isinstance(first, str) and trainer.processing_class.chat_template is None:
        hint = "Write the prompts as text, or give the tokenizer a template."
        raise invalid("train", "model_name_or_path", "with a chat template", name, hint)
    if trainer.accelerator.is_main_process:
        write_run_json(
            training,
            trainer="trl",
            model=name,
            data=str(script.dataset_name),
            seed=training.seed,
            recipe=trainer.recipe,
            settings={
                "rewards": ", ".join(trainer.reward_func_names),
                "steps": trainer.args.max_steps if trainer.args.max_steps > 0 else None,
                "responses per prompt": training.num_generations,
                "learning rate": training.learning_rate,
                "loss": training.loss_type,
            },
        )
    return trainer


def _require_generator(name: str, model: TrainModelConfig, *, trusted: bool) -> None:
    """Refuses what is no language model before it is loaded."""
    options = {"revision": model.model_revision, "trust_remote_code": trusted}
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        got = f"{name} ({' '.join(str(error).split())})"
        hint = "Check the name, and the connection."
        raise invalid("train", "model_name_or_path", "a model that loads", got, hint) from error
    made = config.architectures or []
    if made and not any(name.endswith(GENERATORS) for name in made):
        hint = "Name a model that generates text."
        raise invalid("train", "model_name_or_path", "a language model", made[0], hint)


def _name_files(training: TokenWeightsGRPOConfig) -> None:
    """Metrics and token records go into `output_dir`; a run that starts anew begins them anew."""
    folder = Path(str(training.output_dir)).absolute()
    for option, file in DEFAULT_FILES.items():
        if getattr(training, option) is not None:
            continue
        if option == "token_records" and training.token_recipe.entropy is None:
            continue
        setattr(training, option, str(folder / file))
        if training.resume_from_checkpoint is None and os.environ.get("RANK", "0") == "0":
            (folder / file).unlink(missing_ok=True)


def _say_what_next(
    training: TokenWeightsGRPOConfig,
    words: list[str],
    trainer: TokenWeightsGRPOTrainer,
    *,
    interrupted: bool,
) -> None:
    step, folder = trainer.state.global_step, str(training.output_dir)
    print(f"\n{'interrupted at' if interrupted else 'trained to'} step {step}")
    print(f"model   {folder}")
    print(f"report  tokenweights report {shlex.quote(folder)}")
    if interrupted:
        ranks = trainer.accelerator.num_processes
        start = f"torchrun --nproc_per_node {ranks}" if ranks > 1 else "python"
        old = words.index("--resume_from_checkpoint") if "--resume_from_checkpoint" in words else -1
        kept = words if old < 0 else [*words[:old], *words[old + 2 :]]
        again = shlex.join([*kept, "--resume_from_checkpoint", "True"])
        print(f"resume  {start} -m tokenweights_trl.train {again}")


if __name__ == "__main__":
    main()
