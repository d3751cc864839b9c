"""Philox4x32-10 in NumPy, written from the paper, and the published answers to known questions."""

import numpy as np

# (counter, key, words): the known-answer vectors that Random123 publishes for philox4x32 of 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def words(counter, key):
    """counter (4, n), key (2,): n blocks of four words, (4, n) uint32."""
    c = [np.asarray(part, dtype=np.uint64) for part in counter]
    k = [int(part) for part in key]
    for _ in range(10):
        first, third = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [
            (third >> HALF) ^ c[1] ^ np.uint64(k[0]),
            third & LOW,
            (first >> HALF) ^ c[3] ^ np.uint64(k[1]),
            first & LOW,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c).astype(np.uint32)


def normals(seed, offset, first_block, blocks):
    """Elements 4 * first_block and after, (4 * blocks,) float64."""
    block = np.arange(blocks, dtype=np.uint64) + np.uint64(first_block)
    counter = (
        block & LOW,
        block >> HALF,
        np.full(blocks, offset & 0xFFFFFFFF),
        np.full(blocks, offset >> 32),
    )
    u = (words(counter, (seed & 0xFFFFFFFF, seed >> 32)) + 0.5) * 2.0**-32
    radius, angle = np.sqrt(-2 * np.log(u[::2])), 2 * np.pi * u[1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return pairs.reshape(4, blocks).T.reshape(-1)
