"""What torchrun needs: which process this is, its share of the work, and waiting for the others.

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
    """Number of this process among all, over all machines."""
    return int(os.environ.get("RANK", 0))


def local_rank():
    """Number of this process on its machine: the index of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size():
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_rank_zero():
    """True in the one process that prints and writes shared files."""
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
            raise UserError(
                "another process of this run has ended; fix what it reports (maybe on another machine) and run the same command "
                "again"
            ) from error


def shard(items):
    """This process's part of a list. Parts are contiguous, in the order of the ranks, and differ by one item
    at most.
    """
    n, parts = len(items), world_size()
    return items[n * rank() // parts : n * (rank() + 1) // parts]
