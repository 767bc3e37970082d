"""What torchrun needs: which process this is, its share of the work, and waiting for the others.

    torchrun --nproc_per_node=2 compute_representations.py ...

Every process (rank) computes its share and writes it into the same files on the shared file system; nothing but a few barriers
passes between them. Without torchrun there is one process, of rank 0.
"""

import os
import time
from datetime import timedelta

import torch.distributed as dist

from utils.errors import UserError

PATIENCE = timedelta(days=1)  # ranks wait for the slowest one; torchrun ends them all when one dies


def rank():
    """The number of this process among all, over all machines."""
    return int(os.environ.get("RANK", 0))


def local_rank():
    """The number of this process on its machine: its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def size():
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def first():
    """Whether this is the process that reports and writes what there is one of."""
    return rank() == 0


def start():
    """Meet the other processes. They exchange no tensors, so gloo serves CPU and GPU alike."""
    if size() > 1:
        dist.init_process_group("gloo", timeout=PATIENCE)


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    """Wait until every process is here."""
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError as error:
            time.sleep(5)  # torchrun ends those on the same machine, so that this is said on others only
            raise UserError(
                "another process of this run has ended; mend what it says, maybe on another machine, and run the same command "
                "again"
            ) from error


def share(items):
    """This process's part of a list: the parts are contiguous, in the order of the ranks, and differ by one item at most."""
    n, parts = len(items), size()
    return items[n * rank() // parts : n * (rank() + 1) // parts]
