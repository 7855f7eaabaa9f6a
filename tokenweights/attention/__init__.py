"""Signals from queries and keys: entropy and support of the head-averaged attention."""

from tokenweights.attention.api import (
    attention_entropy,
    attention_entropy_varlen,
    attention_statistics,
)
from tokenweights.attention.columns import attention_received, attention_received_varlen
from tokenweights.attention.distance import attention_distance
from tokenweights.attention.distance_parallel import (
    packed_distance,
    sequence_parallel_distance,
    tensor_parallel_distance,
)
from tokenweights.attention.distribution import attention_weights
from tokenweights.attention.given_weights import attention_entropy_from_weights
from tokenweights.attention.head_classes import HeadClasses, head_classes
from tokenweights.attention.packed import packed_entropy
from tokenweights.attention.parallel import (
    ExchangeBytes,
    sequence_parallel_bytes,
    sequence_parallel_entropy,
    tensor_parallel_bytes,
    tensor_parallel_entropy,
)
from tokenweights.attention.received import Horizon, Received, Reduction
from tokenweights.attention.received_parallel import (
    packed_received,
    received_bytes,
    sequence_parallel_received,
    tensor_parallel_received,
)
from tokenweights.attention.sharded import sharded_bytes, sharded_entropy
from tokenweights.attention.statistics import (
    ENTROPY_KINDS,
    STATISTIC_KINDS,
    AttentionStatistics,
    EntropyKind,
    Heads,
    StatisticKind,
)

__all__ = [
    "ENTROPY_KINDS",
    "STATISTIC_KINDS",
    "AttentionStatistics",
    "EntropyKind",
    "ExchangeBytes",
    "HeadClasses",
    "Heads",
    "Horizon",
    "Received",
    "Reduction",
    "StatisticKind",
    "attention_distance",
    "attention_entropy",
    "attention_entropy_from_weights",
    "attention_entropy_varlen",
    "attention_received",
    "attention_received_varlen",
    "attention_statistics",
    "attention_weights",
    "head_classes",
    "packed_distance",
    "packed_entropy",
    "packed_received",
    "received_bytes",
    "sequence_parallel_bytes",
    "sequence_parallel_distance",
    "sequence_parallel_entropy",
    "sequence_parallel_received",
    "sharded_bytes",
    "sharded_entropy",
    "tensor_parallel_bytes",
    "tensor_parallel_distance",
    "tensor_parallel_entropy",
    "tensor_parallel_received",
]
