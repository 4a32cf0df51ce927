"""The frame kernels, documented in fastops/reference.py.

`max_pool_resize` works row by row, so that its data stays in the first-level cache:

    pool      two screen rows -> one row of pixels, the larger of each pair
    shrink    a row of pixels -> 84 weighted sums, one per column of the observation
    resize    the sums of a few successive rows, weighted and rounded -> one row of the observation

The comment at a loop is the NumPy line that the loop stands for.
"""

from functools import lru_cache

from . import _checks
from ._checks import check_frames, check_gray
from .reference import area_plan

from libc.string cimport memcmp, memset


cdef extern from *:
    """
    /* GCC with glibc on x86-64 compiles a function with this attribute twice, for AVX2 and for any processor, and picks
       one when the module is loaded. Both give the same bits. Other compilers and systems compile it once. */
    #if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) && !defined(FASTOPS_NO_CLONES)
    #define FASTOPS_CLONES __attribute__((target_clones("avx2", "default")))
    #else
    #define FASTOPS_CLONES
    #endif
    """
    ctypedef void cloned_void "FASTOPS_CLONES void"  # Cython has no C attributes, but it copies the name of a type

cdef enum:
    SIZE = 84  # the side of an observation
    MAX_SIDE = 4096  # the longest side of a screen that check_frames accepts
    MARGIN = 64  # the bytes behind a row of pixels that `shrink` may read, with weight 0

if (_checks.SIZE, _checks.MAX_SIDE) != (SIZE, MAX_SIDE):  # the checks would let through what these loops cannot hold
    raise ImportError(f"_frames.pyx has SIZE {SIZE} and MAX_SIDE {MAX_SIDE}, not those of _checks.py")


cdef class Plan:
    """The weights for one screen size, see `area_plan`. It never changes, so threads can share it."""
    cdef const int[::1] y_start, x_start
    cdef const float[:, ::1] y_weights, x_weights
    cdef float factor, bias

    def __cinit__(self, height, width):
        self.y_start, self.y_weights, self.x_start, self.x_weights, self.factor, self.bias = area_plan(height, width)


_cached_plan = lru_cache(maxsize=64)(Plan)


cdef inline void pool(const unsigned char* a, const unsigned char* b, Py_ssize_t width,
                      const unsigned char* palette, unsigned char* pixels) noexcept nogil:
    """The larger pixel of each pair. With a palette, the screens hold its indices."""
    cdef Py_ssize_t x
    if palette == NULL:
        for x in range(width):  # pixels = np.maximum(a, b)
            pixels[x] = a[x] if a[x] > b[x] else b[x]
    elif memcmp(a, b, width) == 0:  # most rows of successive screens are equal: one lookup per pixel will do
        for x in range(width):  # pixels = palette[a]
            pixels[x] = palette[a[x]]
    else:
        for x in range(width):  # pixels = np.maximum(palette[a], palette[b])
            pixels[x] = max(palette[a[x]], palette[b[x]])


cdef inline unsigned int pack(const unsigned char* pixels) noexcept nogil:
    """Four neighbouring pixels in one integer: a single load instead of four."""
    return (<unsigned int>pixels[0] | <unsigned int>pixels[1] << 8 | <unsigned int>pixels[2] << 16
            | <unsigned int>pixels[3] << 24)


cdef inline float unpack(unsigned int packed, int k) noexcept nogil:
    """Pixel k of four as a float, by way of a signed integer: SSE2 and AVX2 convert no other kind."""
    return <float><int>(packed >> 8 * k & 255)


cdef inline void shrink(const unsigned char* pixels, Plan plan, float* sums) noexcept nogil:
    """sums = sum(pixels[x_start + k] * x_weights[k] for k in range(taps)), added in this order, four taps at a time."""
    cdef Py_ssize_t taps = plan.x_weights.shape[0], j, k
    cdef const float* weights
    cdef unsigned int four
    cdef float total
    for k in range(0, taps, 4):
        weights = &plan.x_weights[k, 0]  # four rows of weights
        for j in range(SIZE):
            four = pack(pixels + plan.x_start[j] + k)
            total = sums[j] if k > 0 else 0  # clearing sums first would take 10 % more time
            total = total + unpack(four, 0) * weights[j]
            total = total + unpack(four, 1) * weights[SIZE + j]
            total = total + unpack(four, 2) * weights[2 * SIZE + j]
            total = total + unpack(four, 3) * weights[3 * SIZE + j]
            sums[j] = total


# The sums of the last two different rows. A row is needed again where two output rows share it, and many games draw a
# row twice or alternate between two.
cdef struct Cache:
    float[2][SIZE] sums
    Py_ssize_t[2] row  # where each was seen last, or -1
    int newest  # 0 or 1


cdef inline bint same_row(const unsigned char[:, ::1] a, const unsigned char[:, ::1] b, Py_ssize_t y,
                          Py_ssize_t other) noexcept nogil:
    """Whether rows y and `other` are equal in both screens."""
    cdef size_t width = a.shape[1]
    if y == other:
        return True
    if other < 0:
        return False
    return memcmp(&a[y, 0], &a[other, 0], width) == 0 and memcmp(&b[y, 0], &b[other, 0], width) == 0


cdef inline const float* row_sums(const unsigned char[:, ::1] a, const unsigned char[:, ::1] b, Py_ssize_t y,
                                  const unsigned char* palette, Plan plan, unsigned char* pixels,
                                  Cache* cache) noexcept nogil:
    """The sums of row y, from the cache if they are there. Otherwise they replace the older ones in it."""
    cdef int slot = cache.newest
    if not same_row(a, b, y, cache.row[slot]):
        slot = 1 - slot
        if not same_row(a, b, y, cache.row[slot]):
            pool(&a[y, 0], &b[y, 0], a.shape[1], palette, pixels)
            shrink(pixels, plan, cache.sums[slot])
    cache.row[slot] = y
    cache.newest = slot
    return cache.sums[slot]


cdef inline unsigned char nearest(float x) noexcept nogil:
    """np.rint(x), for 0 <= x <= 255. Floats have no fractions from 2**23 on, so adding 2**23 rounds, halves to even.
    rintf does the same, but without SSE4.1 it is a function call."""
    return <unsigned char><int>(x + <float>8388608 - <float>8388608)


cdef cloned_void resize(const unsigned char[:, ::1] a, const unsigned char[:, ::1] b, const unsigned char* palette,
                        unsigned char[:, ::1] out, Plan plan) noexcept nogil:
    cdef unsigned char[MAX_SIDE + MARGIN] pixels
    cdef float[SIZE] total
    cdef const float* sums
    cdef float weight
    cdef Py_ssize_t i, j, k
    cdef Cache cache
    cache.row[0] = cache.row[1] = -1
    cache.newest = 0
    memset(pixels + a.shape[1], 0, MARGIN)
    for i in range(SIZE):
        for k in range(plan.y_weights.shape[0]):
            weight = plan.y_weights[k, i]
            if weight == 0:  # only unused taps follow
                break
            sums = row_sums(a, b, plan.y_start[i] + k, palette, plan, pixels, &cache)
            for j in range(SIZE):  # total += weight * sums
                total[j] = (total[j] if k > 0 else 0) + weight * sums[j]
        for j in range(SIZE):  # out[i] = np.rint(total * factor + bias)
            out[i, j] = nearest(total[j] * plan.factor + plan.bias)


def max_pool_resize(frame_a, frame_b, out, palette=None):
    check_frames(frame_a, frame_b, out, palette)
    cdef const unsigned char[:, ::1] a = frame_a, b = frame_b
    cdef unsigned char[:, ::1] observation = out
    cdef const unsigned char[::1] grays
    cdef const unsigned char* lookup = NULL
    cdef Plan plan = _cached_plan(a.shape[0], a.shape[1])
    if palette is not None:
        grays = palette
        lookup = &grays[0]
    with nogil:
        resize(a, b, lookup, observation, plan)


cdef cloned_void gray(const unsigned char* rgb, unsigned char* out, Py_ssize_t pixels) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(pixels):  # out = (rgb @ [9798, 19235, 3735] + 2**14) >> 15
        out[i] = <unsigned char>((rgb[3 * i] * 9798 + rgb[3 * i + 1] * 19235 + rgb[3 * i + 2] * 3735 + 16384) >> 15)


def rgb_to_gray(rgb, out):
    check_gray(rgb, out)
    cdef const unsigned char[:, :, ::1] colors = rgb
    cdef unsigned char[:, ::1] grays = out
    with nogil:
        gray(&colors[0, 0, 0], &grays[0, 0], grays.shape[0] * grays.shape[1])
