"""Read images in batches: a `Split` is everything that a pass needs to go over them."""

import gc
import re
import warnings
from collections import Counter
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils.data.images import load_images
from utils.runtime.errors import UserError
from utils.runtime.files import one_line
from utils.runtime.passes import pieces_of, walk


@dataclass
class Loader:
    """A Loader reads a data set in pieces (slices): loader(pieces) yields images [B, 3, side, side].

    images: the data set.
    device: of the images that are yielded.
    num_workers: processes that read; 0 for this one.

    Counts the warnings of the libraries that read images, and tells them once at the end. Raises UserError
    for an image that cannot be read.
    """

    images: Dataset
    device: torch.device = "cpu"
    num_workers: int = 0

    def __call__(self, pieces):
        return (pixels for pixels, _ in self.with_targets(pieces))

    def with_targets(self, pieces):
        """Yield (images, labels [B] or masks [B, ...])."""
        on_gpu = torch.device(self.device).type == "cuda"
        batches = DataLoader(
            _Batches(self.images),
            batch_sampler=[range(piece.start, piece.stop, piece.step or 1) for piece in pieces],
            num_workers=self.num_workers,
            pin_memory=on_gpu,
            collate_fn=_as_it_is,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # else it would draw from the process's random numbers
        )
        batches = iter(batches)
        warned = Counter()
        while (found := _next(batches)) is not None:
            batch, told = found
            warned.update(told)
            if isinstance(batch, UserError):
                raise batch
            yield batch[0].to(self.device, non_blocking=on_gpu), batch[1]
        if warned:
            [(text, _)] = warned.most_common(1)
            tqdm.write(f"note: {warned.total()} warnings while images were read, such as: {text}")


def _next(batches):
    """Return the next batch, None after the last. Raise UserError when a reading process has ended."""
    try:
        return next(batches, None)
    except (RuntimeError, OSError, EOFError) as error:
        # the last two, when it dies while it hands a batch over
        if isinstance(error, RuntimeError) and not re.search("DataLoader worker|shared memory", str(error)):
            raise
        why = "a process that loads images has ended, for want of memory or of shared memory (/dev/shm)"
        fix = "use a smaller --num_workers and run the same command again to resume"
        raise UserError(f"{why}; {fix}") from error


def _start_worker(_):
    gc.freeze()  # a collection would write to the pages that a loader process shares with its parent


@dataclass
class _Batches(Dataset):
    """_Batches is a data set read in whole batches, each with the warnings that came up meanwhile."""

    images: Dataset

    def __getitems__(self, rows):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            items = [self.images[row] for row in rows]
        told = [one_line(each.message) for each in caught]
        errors = [item for item in items if isinstance(item, UserError)]
        return errors[0] if errors else torch.utils.data.default_collate(items), told


def _as_it_is(batch):
    return batch


@dataclass
class Split:
    """A Split is a set of images and how they are read: everything that a `Pass` needs to go over them.

    images: `Images`, or a data set like them.
    device, num_workers: as for `Loader`.
    batch_size: images in one forward pass.
    """

    images: Dataset
    device: torch.device = "cpu"
    num_workers: int = 0
    batch_size: int = 16

    def __len__(self):
        return len(self.images)

    @property
    def names(self):
        """names are the fields of file names: data set and split."""
        return {"dataset": self.images.dataset, "split": self.images.split}

    @property
    def record(self):
        """record is what results say about the images and how they are read."""
        return self.images.record

    @cached_property
    def pieces(self):
        """pieces are the batches, as a `Pass` goes over them."""
        load = Loader(self.images, self.device, self.num_workers)
        return pieces_of(self.images, self.batch_size, load=load, batch_size=self.batch_size)

    def rounds(self, *rounds):
        """Return the batches for a `Pass` that goes over the images several times.

        rounds: for each time a list of slices, of images that are gone over one after the other.
        """
        pieces = copy(self.pieces)
        pieces.rounds = [[batch for rows in round for batch in self._batches(rows)] for round in rounds]
        return pieces

    def _batches(self, rows):
        """Yield the slices of the batches of images (a slice)."""
        images = range(len(self))[rows]
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            yield slice(batch.start, min(batch.stop, len(self)), None if batch.step == 1 else batch.step)

    def walk(self, title="images"):
        """Yield (rows, pixels) of all batches, with a progress bar."""
        return walk(self.pieces, self.pieces.load, title)

    def first(self):
        """Return the pixels of the first batch."""
        return next(iter(self.pieces.load(self.pieces[:1])))


def load_split(args, transform, **changes):
    """Load the `Split` that a stage's flags name.

    args: dataset, data_path, split, subsample, held_out, device, num_workers, batch_size.
    transform: PIL image -> [3, side, side].
    changes: in place of the flags dataset, data_path, split, subsample, held_out.

    Raises UserError as `load_images` does.
    """
    named = ("dataset", "data_path", "split", "subsample", "held_out")
    where = {name: getattr(args, name) for name in named} | changes
    images = load_images(**where, transform=transform)
    return Split(images, args.device, args.num_workers, args.batch_size)
