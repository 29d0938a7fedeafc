"""Counter-based random numbers: a pure function of what a number is for, without a generator or state.

Every random choice of the project (splits, selections, epoch orders, views) is Philox4x32-10 applied to a counter that
identifies the choice. So any number can be drawn again, alone or in a batch of any size, on any machine and in any order.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (section 3.3, Philox).
NumPy's own generators are not used: their distributions may change between releases, and their state depends on the numbers
drawn before.
"""

import numpy as np

# Each purpose has its own stream, so that equal ids draw unrelated numbers for different purposes.
# Append only: the position of a name is part of every published run.
STREAMS = ("shuffle", "split", "selection", "validation", "order", "view", "bootstrap", "exhibits", "head", "replacement")

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_ROUNDS = 10
_SLICE = 65_536  # ids at a time


def philox(counter, key):
    """Philox4x32-10: four random 32-bit words per counter.

    counter: (4, ...) of unsigned integers below 2**32; key: a pair of integers below 2**32.
    Returns an array of counter's shape, dtype uint64, every value below 2**32.
    """
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = (int(k) for k in key)
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0), p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3))


def _words(ids, blocks, *, seed, stream, epoch, view):
    """(blocks, 4, n) random 32-bit words for n ids."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed {seed} is out of range: give a whole number from 0 to 2**64 - 1")
    ids = np.asarray(ids).astype(np.uint64, copy=False)
    assert 0 <= epoch < 2**32 and 0 <= view < 2**8 and 0 < blocks <= 2**16, (epoch, view, blocks)
    purpose = np.uint64(STREAMS.index(stream) << 24 | view << 16)
    shape = (blocks, *ids.shape)
    counter = (
        np.broadcast_to(ids & _LOW, shape),
        np.broadcast_to(ids >> _SHIFT, shape),
        np.full(shape, epoch, np.uint64),
        np.broadcast_to((purpose + np.arange(blocks, dtype=np.uint64))[:, None], shape),
    )
    return philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).swapaxes(0, 1)


def uniforms(ids, count, *, seed, stream, epoch=0, view=0):
    """Uniform numbers in [0, 1): (n, count) float64 with 32 random bits each, row i a function of ids[i] alone.

    ids: (n,) whole numbers from 0 to 2**64 - 1; stream: one of STREAMS.
    Raises ValueError when the seed is out of range.
    """
    blocks = -(-count // 4)
    words = _words(ids, blocks, seed=seed, stream=stream, epoch=epoch, view=view)
    return np.ascontiguousarray(words.reshape(4 * blocks, -1)[:count].T) * 2.0**-32


def shuffle_keys(ids, *, seed, stream, epoch=0):
    """One random 64-bit sort key per id: (n,) uint64, each a function of (seed, stream, epoch, id) alone.

    Sorting ids by their keys shuffles them. The first k of the sorted ids are a random subset, nested for growing k.
    """
    ids = np.asarray(ids)
    found = np.empty(len(ids), np.uint64)
    for start in range(0, len(ids), _SLICE):  # in slices, because the rounds need ten times the memory of the result
        words = _words(ids[start : start + _SLICE], 1, seed=seed, stream=stream, epoch=epoch, view=0)[0]
        found[start : start + _SLICE] = words[0] << _SHIFT | words[1]
    return found
