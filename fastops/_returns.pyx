"""Advantages and discounted sums, along time and per environment. Documentation: fastops/reference.py."""

import numpy as np

from ._checks import check_discounted_sum, check_gae


cdef extern from *:
    const unsigned int FASTOPS_CHECKSUM  # of the sources, see setup.py

CHECKSUM = FASTOPS_CHECKSUM


def gae(rewards, values, dones, last_value, gamma, lam):
    gamma, lam = check_gae(rewards, values, dones, last_value, gamma, lam)
    advantages = np.empty_like(rewards)
    cdef const float[:, ::1] r = rewards, v = values
    cdef const float[:, ::1] d = np.zeros_like(rewards) if dones is None else dones.astype(np.float32, copy=False)
    cdef float[:, ::1] out = advantages
    cdef double[::1] next_value = last_value.astype(np.float64), advantage = np.zeros(last_value.shape)
    cdef double g = gamma, gl = gamma * lam, alive, delta
    cdef Py_ssize_t t, n
    with nogil:
        for t in range(r.shape[0] - 1, -1, -1):
            for n in range(r.shape[1]):
                alive = 1 - <double>d[t, n]
                delta = r[t, n] + g * next_value[n] * alive - v[t, n]  # rewards[t] + gamma * values[t + 1] * alive ...
                advantage[n] = delta + gl * alive * advantage[n]  # delta + gamma * lam * alive * advantage
                next_value[n] = v[t, n]
                out[t, n] = <float>advantage[n]
    return advantages


def discounted_sum(rewards, carry, gamma, reverse):
    cdef double g = check_discounted_sum(rewards, carry, gamma, reverse)
    sums = np.empty(rewards.shape)
    cdef const float[:, ::1] r = rewards
    cdef double[::1] f = carry
    cdef double[:, ::1] out = sums
    cdef Py_ssize_t steps = r.shape[0], i, t, n
    cdef bint backward = reverse
    with nogil:
        for i in range(steps):
            t = steps - 1 - i if backward else i
            for n in range(r.shape[1]):  # carry[:] = sums[t] = gamma * carry + rewards[t]
                f[n] = g * f[n] + r[t, n]
                out[t, n] = f[n]
    return sums
