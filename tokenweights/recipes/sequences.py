"""Entropies of whole sequences out of the passes of a model that is spread over ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn

from tokenweights._errors import invalid
from tokenweights._typing import typed
from tokenweights.capture import CapturedAttention, capture_attention
from tokenweights.distributed import gathered, held_by_one
from tokenweights.recipes.attention import AttentionEntropy


class SequenceEntropies:
    """The entropies of every sequence of a batch, from micro-batches in any order.

    Of a megatron-core model: tokens are gathered over the ranks that share them, padding is
    dropped, and at last the stage of each layer hands its entropies to all other stages.

    Args:
        attention: What is read, with its layers numbered.

    Example:
        >>> entropies = SequenceEntropies(AttentionEntropy(layers=(2,)))
        >>> entropies.begin(torch.tensor([1, 0]), torch.tensor([7, 5]))
    """

    def __init__(self, attention: AttentionEntropy) -> None:
        self._attention = attention
        self._found: dict[int, dict[int, Tensor]] = {n: {} for n in attention.layers or ()}
        self._micro_batch: tuple[list[int], list[int]] = [], []

    @contextmanager
    def tapped(self, chunks: Sequence[nn.Module], *, packed: bool) -> Iterator[None]:
        """A context in which every forward leaves the entropies of its micro-batch here.

        Args:
            chunks: The chunks of the model that this pipeline stage holds.
            packed: As in `capture_attention`.

        Yields:
            Nothing.
        """
        layers, model = self._attention.layers or (), nn.ModuleList(chunks)
        with capture_attention(model, layers, packed=packed, reduce=self._keep):
            yield

    @typed
    def begin(self, numbers: Int[Tensor, " batch"], lengths: Int[Tensor, " batch"]) -> None:
        """Says which sequences the next forward passes are of.

        Args:
            numbers: Place of each of them in the batch, from 0.
            lengths: Their tokens without padding, which follows them.
        """
        self._micro_batch = numbers.tolist(), lengths.tolist()

    def on_all_stages(self, *, group: dist.ProcessGroup | None) -> dict[int, Tensor]:
        """Entropies by layer, sequence after sequence, on every stage.

        Args:
            group: The pipeline stages, all of which have to call; None if this is all.

        Returns:
            Entropies by the number of the layer.

        Raises:
            TokenWeightsError: If a layer is on no stage.
        """
        whole = {}
        for layer, rows in self._found.items():
            own = torch.cat([rows[number] for number in sorted(rows)]) if rows else None
            whole[layer] = held_by_one(own, group=group)
        return whole

    def _keep(self, captured: CapturedAttention) -> None:
        numbers, lengths = self._micro_batch
        shards = captured.shards
        if shards is None:
            hint = "Read other models with `capture_attention`."
            raise invalid("SequenceEntropies", "chunks", "of megatron-core", "others", hint)
        # Queries and keys stay in the precision they have; the sums over them are float32.
        with torch.autocast(captured.query.device.type, enabled=False):
            own = self._attention.captured(captured).flatten()
        row = gathered(own, shards.positions, dim=0, group=shards.token_group)
        starts = shards.cu_seqlens.tolist()
        # Fillers may follow the last sequence.
        for number, start, length in zip(numbers, starts, lengths, strict=False):
            self._found[captured.layer][number] = row[start : start + length]
