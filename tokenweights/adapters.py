"""What adapters of trainers use of the library beyond its public face, in one place."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nested import to_padded_tensor

from tokenweights._errors import TokenWeightsError as TokenWeightsError
from tokenweights._errors import invalid as invalid
from tokenweights.gradients.preserved import preserved as preserved
from tokenweights.recipes import corrects_sampler as corrects_sampler
from tokenweights.recipes import require_columns as require_columns
from tokenweights.recipes import require_version as require_version
from tokenweights.recipes.backward import AttentionReading as AttentionReading
from tokenweights.recipes.backward import joined_readings as joined_readings
from tokenweights.recipes.config import FILES as FILES
from tokenweights.recipes.identity import label_numbers as label_numbers
from tokenweights.recipes.identity import text_numbers as text_numbers
from tokenweights.recipes.nested import placed_on_config as placed_on_config
from tokenweights.recipes.nested import response_scores as response_scores
from tokenweights.recipes.sequences import SequenceEntropies as SequenceEntropies
from tokenweights.recipes.signals import AttentionEntropy as AttentionEntropy
from tokenweights.report import write_run_json as write_run_json
from tokenweights.report.records import append_log as append_log
from tokenweights.report.rollouts import RolloutRecords as RolloutRecords

# What a recipe reads of attention.
Attention = AttentionEntropy | AttentionReading


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A context in which a variable of the environment has a value, and no other changes.

    Args:
        name: The variable.
        value: Its value.

    Yields:
        Nothing.

    Example:
        >>> with environment("TOKENWEIGHTS_EXAMPLE", "1"):
        ...     os.environ["TOKENWEIGHTS_EXAMPLE"]
        '1'
        >>> "TOKENWEIGHTS_EXAMPLE" in os.environ
        False
    """
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        os.environ |= {} if before is None else {name: before}


def taken_gradients(module: nn.Module) -> list[Tensor]:
    """This rank's gradients, DTensors or flat shards, taken away from the module.

    Args:
        module: A module after a backward pass.

    Returns:
        The gradients of the parameters that have one.
    """
    shards = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    module.zero_grad(set_to_none=True)
    return shards


def padded_columns(data: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Columns of a `RolloutBatch`, padded on the right, out of jagged tensors.

    Args:
        data: Jagged tensors, each row a response, by the trainer's names.
        names: The trainer's name of each column.

    Returns:
        The columns that `data` has: token ids as they are, all others in float32, rewards summed
        over each response.
    """
    given = {name: data[field] for name, field in names.items() if field in data.keys()}
    columns = {name: to_padded_tensor(values, 0.0) for name, values in given.items()}
    columns |= {name: columns[name].float() for name in columns if name != "token_ids"}
    if "rewards" in columns:
        columns["rewards"] = columns["rewards"].sum(-1)
    return columns
