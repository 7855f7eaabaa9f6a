"""A process group next to the global one, over gloo."""

from datetime import timedelta

import torch.distributed as dist


class StatelessProcessGroup:
    @staticmethod
    def create(host, port, rank, world_size):
        timeout = timedelta(seconds=120)
        store = dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=timeout)
        return dist.ProcessGroupGloo(store, rank, world_size, timeout)
