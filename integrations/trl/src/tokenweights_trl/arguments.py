"""What the command line takes beside the training arguments."""

from dataclasses import dataclass, field

from trl.scripts.utils import ScriptArguments
from trl.trainer.model_config import ModelConfig


@dataclass
class TrainArguments(ScriptArguments):
    """TRL's script arguments, and how a response is rewarded.

    Args:
        dataset_name: A json, jsonl or parquet file, a folder of such files or one made by
            `save_to_disk`, or a name on the Hub. Also `--dataset`.
        prompt_column: Column of the prompt.
        answer_column: Column of the reference answer.
        reward_funcs: Reward functions by name or import path; their rewards are added.
        overlong_buffer: Length of the soft penalty's ramp before `max_completion_length`, in
            tokens; 0 leaves long responses unpunished.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "aliases": ["--dataset"],
            "help": "A json, jsonl or parquet file, a folder of such files or one made by "
            "`save_to_disk`, or a name on the Hub.",
        },
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column of the prompt. None takes `prompt`."}
    )
    answer_column: str | None = field(
        default=None,
        metadata={"help": "Column of the reference answer. None takes `answer` or `solution`."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "One or more of `boxed_match` (the default: the last \\boxed{} is the answer), "
            "`numeric_match` (the last number is that of the answer, after #### as in GSM8K), "
            "TRL's `accuracy_reward`, `reasoning_accuracy_reward`, `think_format_reward`, and "
            "functions of your own, `package.module:function`."
        },
    )
    overlong_buffer: int = field(
        default=0,
        metadata={"help": "Tokens before `max_completion_length` with a growing penalty; 0: none."},
    )


@dataclass
class TrainModelConfig(ModelConfig):
    """TRL's model arguments; the model's name is also `--model`."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"aliases": ["--model"], "help": "Model checkpoint, a folder or a Hub name."},
    )
