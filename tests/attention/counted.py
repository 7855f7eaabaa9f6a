"""The bytes that a rank receives."""

import torch.distributed as dist


class CountedBytes:
    """Counts the bytes that a rank receives through the collectives the library uses."""

    def __init__(self, dims=4):
        self.received, self.dims = 0, dims
        self.gather, self.reduce, self.all_gather = dist.gather, dist.reduce, dist.all_gather

    def __enter__(self):
        def gather(tensor, parts, **options):
            if parts is not None:
                self.received += (len(parts) - 1) * tensor.nbytes
            return self.gather(tensor, parts, **options)

        def reduce(tensor, dst, group):
            # Every other rank's share reaches the owner once, directly or already summed.
            if dist.get_rank() == dst:
                self.received += (group.size() - 1) * tensor.nbytes
            return self.reduce(tensor, dst=dst, group=group)

        def all_gather(parts, tensor, group):
            # Positions, lengths and results are not counted: they do not scale with width.
            if tensor.dim() == self.dims:
                self.received += (len(parts) - 1) * tensor.nbytes
            return self.all_gather(parts, tensor, group=group)

        dist.gather, dist.reduce, dist.all_gather = gather, reduce, all_gather
        return self

    def __exit__(self, *_):
        dist.gather, dist.reduce, dist.all_gather = self.gather, self.reduce, self.all_gather
