"""Random numbers that depend on a name and a position alone.

Philox (https://doi.org/10.1145/2063384.2063405) is a counter-based generator: number `n` of a stream can be had
without those before it.  The stream's key is a hash of what the numbers are for, so that they are the same whatever the
device, the number of workers, the order of the modules, and the blocks in which they are asked for.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing

_PER_STEP = 8
"""32-bit numbers that one step of the counter gives (four words of 64 bits)."""


class Draw:
    """A stream of random 32-bit numbers, addressed by position."""

    __slots__ = ("_purpose",)

    def __init__(self, *purpose: int | str) -> None:
        self._purpose = purpose

    @property
    def _key(self) -> int:
        text = "\0".join(f"{type(part).__name__}:{part}" for part in self._purpose)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return int.from_bytes(digest, "little")

    def words(self, start: int, stop: int) -> numpy.typing.NDArray[Any]:
        """Numbers [start, stop) of the stream, uint32."""
        import numpy as np

        first, last = start // _PER_STEP, -(-stop // _PER_STEP)
        generator = np.random.Philox(key=self._key)
        generator.advance(first)
        raw = generator.random_raw((last - first) * _PER_STEP // 2)
        words: numpy.typing.NDArray[Any] = np.asarray(raw, dtype="<u8").view("<u4")
        return words[start - first * _PER_STEP : stop - first * _PER_STEP]

    def keep(self, start: int, stop: int, density: float) -> numpy.typing.NDArray[Any]:
        """Booleans for positions [start, stop), each true with probability `density` (to 2⁻³²)."""
        import numpy as np

        if density >= 1:
            return np.ones(stop - start, dtype=bool)
        kept: numpy.typing.NDArray[Any] = self.words(start, stop) < np.uint32(min(round(density * 2.0**32), 2**32 - 1))
        return kept

    def uniform(self, start: int, stop: int) -> numpy.typing.NDArray[Any]:
        """Numbers in [0, 1) for positions [start, stop), float32 (24 bits of them random)."""
        import numpy as np

        return (self.words(start, stop) >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)

    def normal(self, count: int) -> numpy.typing.NDArray[Any]:
        """`count` normally distributed numbers, float32: where to start an iteration."""
        import numpy as np

        return np.random.Generator(np.random.Philox(key=self._key)).standard_normal(count, dtype=np.float32)
