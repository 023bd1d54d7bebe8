"""Sending of a token's row that is narrowed to fp8 on the way."""

from collections.abc import Callable, Sequence

from pallas_kernels import simt
from pallas_kernels.exchange.fp8 import E4M3_MAX, SMALLEST_PEAK
from pallas_kernels.simt import Word
from pallas_kernels.sizes import SCALE_CHANNELS

PIECE = simt.VECTOR_BYTES  # channels of a thread, which reads 2 bytes and writes 1 for each
PIECES_UNDER_WAY = 4  # of a thread
LANES = SCALE_CHANNELS // PIECE  # adjacent threads that share a scale


def pieces(hidden: int) -> int:
    """Threads that a row of D channels has work for."""
    return hidden // PIECE


def send_narrowed(
    source: Word,
    targets: Callable[[], Sequence[tuple[Word, Word]]],
    hidden: int,
    threads: int,
) -> None:
    """Narrows a row of bf16 and sends it to every `(address, wanted)` target.

    Bit by bit what `fp8.pack_rows` gives. Like `simt.copy_row`: `threads`, a power of two and whole
    warps, share the work.
    """
    known = []
    for places, inside in simt.pieces_of(pieces(hidden), threads, PIECES_UNDER_WAY):
        starts = [source + (place * (2 * PIECE)).wide() for place in places]
        # All loads are issued before the first is waited for.
        loaded = [simt.load_words(start, 4) + simt.load_words(start + PIECE, 4) for start in starts]
        if not known:
            known.extend(targets())
        scales = [
            simt.scale_of(simt.peak_bf16(words, LANES), SMALLEST_PEAK, E4M3_MAX) for words in loaded
        ]
        narrow = [
            simt.narrow_e4m3(words, scale) for words, scale in zip(loaded, scales, strict=True)
        ]
        for target, wanted in known:
            with simt.when(wanted if inside is None else wanted & inside):
                for place, scale, values in zip(places, scales, narrow, strict=True):
                    simt.store_words(target + (place * PIECE).wide(), values)
                    with simt.when(place % LANES == 0):
                        at = target + (place // LANES * 4 + hidden).wide()
                        simt.store(at, simt.float_word(scale))
