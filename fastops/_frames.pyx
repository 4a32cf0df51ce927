"""Frames: color to gray; max-pool two and area-resize the result to 84x84. Documentation: fastops/reference.py."""

from functools import lru_cache

from ._checks import check_frames, check_gray
from .reference import area_plan

from libc.string cimport memcmp


cdef extern from *:
    """
    /* A second version of the loops for AVX2, picked when the module is loaded. Both give the same bits. Other compilers
       and systems than GCC with glibc on x86-64 make one version. */
    #if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__GLIBC__) && !defined(FASTOPS_NO_CLONES)
    #define FASTOPS_CLONES __attribute__((target_clones("avx2", "default")))
    #else
    #define FASTOPS_CLONES
    #endif
    """
    ctypedef void cloned_void "FASTOPS_CLONES void"  # Cython passes a C attribute on with the type
    const unsigned int FASTOPS_CHECKSUM  # of the sources, see setup.py

cdef enum:
    SIZE = 84
    MAX_SIDE = 4096

CHECKSUM = FASTOPS_CHECKSUM


cdef class Plan:
    """The weights for one frame size, see `area_plan`. Never changes: threads share it."""
    cdef const int[::1] y_start, x_start
    cdef const float[:, ::1] y_weights, x_weights
    cdef float factor, bias

    def __cinit__(self, height, width):
        self.y_start, self.y_weights, self.x_start, self.x_weights, self.factor, self.bias = area_plan(height, width)


_plan = lru_cache(maxsize=64)(Plan)


cdef inline void pool(const unsigned char* a, const unsigned char* b, Py_ssize_t width,
                      const unsigned char* palette, unsigned char* row) noexcept nogil:
    cdef Py_ssize_t x
    if palette == NULL:
        for x in range(width):  # np.maximum(a, b)
            row[x] = a[x] if a[x] > b[x] else b[x]
    elif memcmp(a, b, width) == 0:
        for x in range(width):  # palette[a]
            row[x] = palette[a[x]]
    else:
        for x in range(width):  # np.maximum(palette[a], palette[b])
            row[x] = max(palette[a[x]], palette[b[x]])


cdef inline void shrink(const unsigned char* row, Plan plan, float* sums) noexcept nogil:
    """Weighted sums of one row, four taps at a time."""
    cdef unsigned int[SIZE] taps
    cdef const unsigned char* source
    cdef const float* weights
    cdef Py_ssize_t j, k
    for k in range(0, plan.x_weights.shape[0], 4):
        for j in range(SIZE):  # compiles to one load; what lies behind the row's end weighs 0
            source = row + plan.x_start[j] + k
            taps[j] = (<unsigned int>source[0] | <unsigned int>source[1] << 8 | <unsigned int>source[2] << 16
                       | <unsigned int>source[3] << 24)
        weights = &plan.x_weights[k, 0]
        for j in range(SIZE):  # sums += sum(row[start + k] * weights[k] for k in range(4)), added one by one
            sums[j] = ((((sums[j] if k > 0 else 0) + <float><int>(taps[j] & 255) * weights[j])
                        + <float><int>(taps[j] >> 8 & 255) * weights[SIZE + j])
                       + <float><int>(taps[j] >> 16 & 255) * weights[2 * SIZE + j]
                       ) + <float><int>(taps[j] >> 24) * weights[3 * SIZE + j]


cdef inline bint repeats(const unsigned char[:, ::1] a, const unsigned char[:, ::1] b, Py_ssize_t y,
                         Py_ssize_t other) noexcept nogil:
    return y == other or (other >= 0 and memcmp(&a[y, 0], &a[other, 0], a.shape[1]) == 0
                          and memcmp(&b[y, 0], &b[other, 0], a.shape[1]) == 0)


cdef cloned_void resize(const unsigned char[:, ::1] a, const unsigned char[:, ::1] b, const unsigned char* palette,
                        unsigned char[:, ::1] out, Plan plan) noexcept nogil:
    cdef unsigned char[MAX_SIDE + 64] row  # taps to spare reach behind the end
    cdef float[2][SIZE] sums  # of the last two rows that differ: many games draw every other row alike
    cdef Py_ssize_t[2] rows
    cdef float[SIZE] total
    cdef Py_ssize_t width = a.shape[1], i, j, k, y
    cdef int s = 0
    cdef float weight
    rows[0] = rows[1] = -1
    for j in range(width, width + 64):
        row[j] = 0
    for i in range(SIZE):
        for k in range(plan.y_weights.shape[0]):
            weight = plan.y_weights[k, i]
            if weight == 0:
                break
            y = plan.y_start[i] + k
            if not repeats(a, b, y, rows[s]):
                s = 1 - s
                if not repeats(a, b, y, rows[s]):
                    pool(&a[y, 0], &b[y, 0], width, palette, row)
                    shrink(row, plan, sums[s])
            rows[s] = y
            for j in range(SIZE):  # total += weight * sums
                total[j] = (total[j] if k > 0 else 0) + weight * sums[s][j]
        for j in range(SIZE):  # out[i] = np.rint(total * factor + bias): floats from 2**23 on are the integers
            out[i, j] = <unsigned char><int>(total[j] * plan.factor + plan.bias + <float>8388608 - <float>8388608)


def max_pool_resize(frame_a, frame_b, out, palette=None):
    check_frames(frame_a, frame_b, out, palette)
    cdef const unsigned char[:, ::1] a = frame_a, b = frame_b
    cdef unsigned char[:, ::1] small = out
    cdef const unsigned char[::1] grays
    cdef const unsigned char* lookup = NULL
    cdef Plan plan = _plan(a.shape[0], a.shape[1])
    if palette is not None:
        grays = palette
        lookup = &grays[0]
    with nogil:
        resize(a, b, lookup, small, plan)


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
