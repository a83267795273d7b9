"""Label Studio's brush: RLE of an RGBA image's bytes, packed bit by bit.

Source: github.com/thi-ng/umbrella, packages/rle-pack, which Label Studio's editor uses.
"""

import numpy as np


WORD = 8  # bits of a value: one channel of a pixel


class _Bits:
    """Bytes read as numbers of any size, the highest bit first; raises ValueError past their end."""

    def __init__(self, data: bytes):
        self.data = data
        self.place = 0

    def read(self, size: int) -> int:
        first, end = self.place // 8, self.place + size
        if end > 8 * len(self.data):
            raise ValueError("its RLE ends too early")
        self.place = end
        last = -(-end // 8)
        return int.from_bytes(self.data[first:last], "big") >> (8 * last - end) & ((1 << size) - 1)

    def words(self, count: int) -> np.ndarray:
        """`count` values of 8 bits."""
        packed = self.read(WORD * count).to_bytes(count, "big")
        return np.frombuffer(packed, dtype=np.uint8)


def decode_brush(data: object, size: tuple[int, int]) -> np.ndarray:
    """The (H, W) bool array of the pixels that are not transparent in the image of this (W, H).

    Raises:
        ValueError: data that are damaged, or of another size.
    """
    if not isinstance(data, list) or not all(type(value) is int and 0 <= value < 256 for value in data):
        raise ValueError("its RLE is not a list of bytes")
    bits = _Bits(bytes(data))
    length, word = bits.read(32), bits.read(5) + 1
    if length != 4 * size[0] * size[1] or word != WORD:
        raise ValueError(f"its RLE has {length} values of {word} bits, not {size[0]}x{size[1]} pixels")
    sizes = [bits.read(4) + 1 for _ in range(4)]
    values = np.zeros(length, dtype=np.uint8)
    place = 0
    while place < length:
        same = bits.read(1)
        end = place + 1 + bits.read(sizes[bits.read(2)])
        if end > length:
            raise ValueError("its RLE is too long")
        values[place:end] = bits.read(WORD) if same else bits.words(end - place)
        place = end
    if any(bits.data[-(-bits.place // 8) :]):
        raise ValueError("its RLE goes on past the last pixel")
    return values.reshape(size[1], size[0], 4)[..., 3] > 0
