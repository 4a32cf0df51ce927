"""The two loops of `RunningMeanStd`, over samples (S, F). The comments at them are the NumPy lines."""

import numpy as np

from libc.stdint cimport uint8_t, uint32_t, uint64_t

ctypedef fused number:
    uint8_t
    float
    double


def sums(const uint8_t[:, ::1] samples not None):
    """The sum and the sum of squares over the samples, uint64 (F,) each."""
    cdef Py_ssize_t count = samples.shape[0], features = samples.shape[1], left, width, top, bottom, s, f
    cdef uint32_t[2048] block_sum, block_squares
    cdef uint32_t x
    cdef const uint8_t* row
    totals = np.zeros((2, features), np.uint64)
    cdef uint64_t[:, ::1] total = totals
    with nogil:
        for left in range(0, features, 2048):  # the sums of so many features stay in the first-level cache
            width = min(<Py_ssize_t>2048, features - left)
            for top in range(0, count, 65536):  # the sum of so many squares of a uint8 fits into a uint32
                bottom = min(top + 65536, count)
                for f in range(width):
                    block_sum[f] = block_squares[f] = 0
                for s in range(top, bottom):
                    row = &samples[s, left]
                    for f in range(width):  # samples.sum(0), np.square(samples).sum(0)
                        x = row[f]
                        block_sum[f] += x
                        block_squares[f] += x * x
                for f in range(width):
                    total[0, left + f] += block_sum[f]
                    total[1, left + f] += block_squares[f]
    return totals[0], totals[1]


def normalize(const number[:, ::1] samples not None, const double[::1] mean not None, const double[::1] std not None,
              double clip, float[:, ::1] out not None):
    cdef Py_ssize_t count = samples.shape[0], features = samples.shape[1], s, f
    cdef double z
    if not (mean.shape[0] == std.shape[0] == out.shape[1] == features and out.shape[0] == count):
        raise ValueError("mean, std, out: expected shapes that match the samples")
    with nogil:
        for s in range(count):
            for f in range(features):  # out = np.clip((samples - mean) / std, -clip, clip)
                z = (samples[s, f] - mean[f]) / std[f]
                z = clip if z > clip else z
                z = -clip if z < -clip else z
                out[s, f] = <float>z
