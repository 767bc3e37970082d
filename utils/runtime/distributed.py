"""Share work among the processes of torchrun: which one this is, its part, and waiting for the others.

    torchrun --nproc_per_node=2 compute_representations.py ...

Every process (rank) computes its share and writes it into the same files. Processes exchange no tensors; they
only meet at a few barriers. Without torchrun there is one process, rank 0.
"""

import os
import time
from datetime import timedelta

import torch.distributed as dist

from utils.runtime.errors import UserError

PATIENCE = timedelta(days=1)  # ranks wait this long for the slowest one; torchrun ends them all when one dies


def rank():
    """Return the number of this process among all, over all machines."""
    return int(os.environ.get("RANK", 0))


def local_rank():
    """Return the number of this process on its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size():
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_rank_zero():
    """Return whether this is the one process that prints and writes shared files."""
    return rank() == 0


def start():
    """Meet the other processes. No tensors are exchanged, so gloo serves CPU and GPU alike."""
    if world_size() > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)


def stop():
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    """Wait until every process is here. Raises UserError when another one has ended."""
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError as error:
            # on this machine torchrun kills us before this prints; on other machines the user needs the
            # message
            time.sleep(5)
            fix = "fix what it reports (maybe on another machine) and run the same command again"
            raise UserError(f"another process of this run has ended; {fix}") from error


def shard(items):
    """Return this process's part of a list. Parts are contiguous, and differ by one item at most."""
    share = [len(items) * number // world_size() for number in (rank(), rank() + 1)]
    return items[slice(*share)]
