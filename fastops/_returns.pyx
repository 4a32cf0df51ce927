"""The kernels for returns, documented in fastops/reference.py. The comments are the NumPy lines."""

import numpy as np

from ._checks import check_discounted_sum, check_gae


def gae(rewards, values, dones, last_value, gamma, lam):
    gamma, lam = check_gae(rewards, values, dones, last_value, gamma, lam)
    if dones is None:
        dones = np.zeros_like(rewards)
    advantages = np.empty_like(rewards)
    cdef const float[:, ::1] reward = rewards, value = values, done = dones.astype(np.float32, copy=False)
    cdef float[:, ::1] out = advantages
    cdef double[::1] next_value = last_value.astype(np.float64), advantage = np.zeros(last_value.shape)
    cdef double discount = gamma, decay = gamma * lam, alive, delta
    cdef Py_ssize_t t, n
    with nogil:
        for t in range(reward.shape[0] - 1, -1, -1):
            for n in range(reward.shape[1]):
                alive = 1 - <double>done[t, n]  # alive = 1 - dones[t]
                # delta = rewards[t] + gamma * next_value * alive - values[t]
                delta = reward[t, n] + discount * next_value[n] * alive - value[t, n]
                # advantages[t] = advantage = delta + gamma * lam * alive * advantage
                advantage[n] = delta + decay * alive * advantage[n]
                out[t, n] = <float>advantage[n]
                next_value[n] = value[t, n]  # next_value = values[t]
    return advantages


def discounted_sum(rewards, carry, gamma, reverse):
    cdef double discount = check_discounted_sum(rewards, carry, gamma, reverse)
    sums = np.empty(rewards.shape)
    cdef const float[:, ::1] reward = rewards
    cdef double[::1] total = carry
    cdef double[:, ::1] out = sums
    cdef Py_ssize_t steps = reward.shape[0], i, t, n
    cdef bint backward = reverse
    with nogil:
        for i in range(steps):
            t = steps - 1 - i if backward else i
            for n in range(reward.shape[1]):  # carry[:] = sums[t] = gamma * carry + rewards[t]
                total[n] = discount * total[n] + reward[t, n]
                out[t, n] = total[n]
    return sums
