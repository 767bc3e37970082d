"""Keep the largest of many norms that come in batches: of equal ones those of the earlier images."""

import numpy as np

LAST_IMAGE = 2**32 - 1
CORRECTED = 2**22  # norms that are corrected together


def taken_of(keys):
    """Return how many places of keys [N, c] are taken, up to the last, [N]."""
    taken = keys[:, ::-1] != 0
    return np.where(taken.any(axis=1), keys.shape[1] - taken.argmax(axis=1), 0)


def enter(keys, taken, new, floor):
    """Put new keys [N, B] that are at least floor [N] into keys [N, c], in place, behind others.

    Where there is no room, larger ones replace smaller ones, and floor rises to the smallest that is left.
    So whatever is not among the keys is below floor.

    taken: `taken_of` keys, changed in place.

    Returns neuron, place and column of each that enters.
    """
    neurons, columns = (new >= floor[:, None]).nonzero()
    count = np.bincount(neurons, minlength=len(keys))
    end = taken + count
    full = end > keys.shape[1]
    places = np.arange(len(neurons)) + (end - count.cumsum())[neurons]
    fits = ~full[neurons]
    neurons, places, columns = neurons[fits], places[fits], columns[fits]
    keys[neurons, places] = new[neurons, columns]
    taken[:] = np.minimum(end, keys.shape[1])
    found = [(neurons, places, columns)]
    full = np.flatnonzero(full)
    found += _replace(keys, new, full)
    floor[full] = np.maximum(floor[full], keys[full].min(axis=1))
    return tuple(map(np.concatenate, zip(*found, strict=True)))


def _replace(keys, new, neurons):
    """Replace the smallest keys of some neurons in place by larger new ones. Yields as `enter` returns."""
    order = new[neurons].argsort(axis=1)[:, ::-1]
    for turn in range(new.shape[1]):
        columns = order[:, turn]
        places = keys[neurons].argmin(axis=1)
        larger = new[neurons, columns] > keys[neurons, places]
        neurons, order, places, columns = (part[larger] for part in (neurons, order, places, columns))
        keys[neurons, places] = new[neurons, columns]
        yield neurons, places, columns


def key_of(norms, images):
    """Return sort keys, uint64: larger norms first, and of equal norms the earlier image.

    The norm (float32) is in the high 32 bits, the reversed image index in the low 32.
    """
    bits = np.ascontiguousarray(np.abs(norms)).view(np.uint32)  # bits of non-negative floats rise with them
    return bits.astype(np.uint64) << np.uint64(32) | (LAST_IMAGE - images.astype(np.int64)).astype(np.uint64)


def image_of(keys):
    """Return the images of `key_of`, int32."""
    return (LAST_IMAGE - (keys & np.uint64(LAST_IMAGE)).astype(np.int64)).astype(np.int32)


def norm_of(keys):
    """Return the norms of `key_of`, float32."""
    return (keys >> np.uint64(32)).astype(np.uint32).view(np.float32)


def smallest_key(norms):
    """Return a key that no image of a norm at least so large is below, and few others are not."""
    down = np.nextafter(np.maximum(norms, 0).astype(np.float32), np.float32(0))
    return key_of(down, np.full(down.shape, LAST_IMAGE))


def correct(file, neurons, images, norms):
    """Store the norms of the k largest of some neurons [n, k], and make no other one of these as large.

    file: `ArrayFile` of all norms [images, N]. It may have been corrected before.
    """
    below = np.nextafter(norms[:, -1], 0, dtype=np.float32)
    together = max(1, CORRECTED // file.shape[1])
    for start in range(0, file.shape[0], together):
        rows = slice(start, min(start + together, file.shape[0]))
        block = file.read()[rows].copy()
        block[:, neurons] = np.minimum(block[:, neurons], below)
        n, place = np.nonzero((images >= rows.start) & (images < rows.stop))
        block[images[n, place] - start, neurons[n]] = norms[n, place]
        file[rows] = block
