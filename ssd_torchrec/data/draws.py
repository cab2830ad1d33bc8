"""Random numbers that depend on what they are for, not on who draws them or when.

Each is a hash of a few integers, so that any rank finds the number of any event without drawing those before it.
Source: Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators, the finaliser of SplitMix64.
"""

import numpy as np
from numpy.typing import NDArray

from ssd_torchrec.data.rows import Ints

Words = NDArray[np.uint64]


@np.errstate(over="ignore")  # modulo 2^64
def uniform(*words: int | Ints) -> NDArray[np.float64]:
    """Numbers in [0, 1), one for each position of the words broadcast against each other."""
    state = np.zeros((), np.uint64)
    for word in words:
        state = splitmix64(state ^ np.asarray(word, np.int64).view(np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def splitmix64(x: Words) -> Words:
    """A number of 64 bits for each, all of whose bits hang on all of its; one to one."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
