"""An independent oracle of the noise: Philox4x32-10 in Python integers, Box-Muller in Python's float64.

Written from the generator's description (Salmon et al. 2011), sharing nothing with the package.
"""

import math

MASK = 2**32 - 1


def philox4x32_10(counter, key):
    c, k = list(counter), list(key)
    for round_number in range(10):
        if round_number:
            k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return tuple(c)


def words(index, block, seed, stream):
    index, seed = index % 2**64, seed % 2**64
    return philox4x32_10((block, stream, index & MASK, index >> 32), (seed & MASK, seed >> 32))


def normals(index, block, seed, stream):
    """The four normals of a block; u keeps the 31 bits that the definition keeps."""
    w = words(index, block, seed, stream)
    out = []
    for a, b in ((w[0], w[1]), (w[2], w[3])):
        radius = math.sqrt(-2.0 * math.log((a >> 1) * 2.0**-31 + 2.0**-32))
        angle = 2.0 * math.pi * b / 2.0**32
        out += [radius * math.cos(angle), radius * math.sin(angle)]
    return out
