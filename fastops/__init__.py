"""The loops of RND-PPO that NumPy is slow at, in Cython, with NumPy twins where no compiler was at hand.

    max_pool_resize(frame_a, frame_b, out, palette=None)    two Atari frames -> one 84x84 observation
    rgb_to_gray(rgb, out)                                   a frame in color -> gray, for emulators that give no gray
    gae(rewards, values, dones, last_value, gamma, lam)     generalised advantage estimation
    discounted_sum(rewards, carry, gamma, reverse)          discounted running sums of the rewards
    RunningMeanStd(shape=(), count=1e-4)                    running mean and variance, normalise and clip

`ATARI_GRAYS` is the palette of ALE's screens. Arrays over time are (T, N): T steps of N environments. `BACKEND` is
"cython" or "numpy"; both give the same bits.
"""

import pkgutil
import warnings
import zlib
from importlib import import_module
from pathlib import Path

from . import reference
from .reference import ATARI_GRAYS, RunningMeanStd, discounted_sum, gae, max_pool_resize, rgb_to_gray

__all__ = ["ATARI_GRAYS", "BACKEND", "RunningMeanStd", "discounted_sum", "gae", "max_pool_resize", "rgb_to_gray"]

# From the root of the repository this folder hides an installed fastops: its compiled modules are found all the same.
__path__ = pkgutil.extend_path(__path__, __name__)


_SOURCES = ("_checks.py", "reference.py", "_frames.pyx", "_returns.pyx", "_stats.pyx")  # as in setup.py
try:
    _frames, _returns, _stats = (import_module(f"{__name__}.{name}") for name in ("_frames", "_returns", "_stats"))
    _checksum = zlib.crc32("".join(Path(__file__).with_name(name).read_text("utf-8") for name in _SOURCES).encode())
    for _module in (_frames, _returns, _stats):
        if _checksum != _module.CHECKSUM:
            raise ImportError(f"{_module.__file__} was built from other sources than those in {Path(__file__).parent}")
except (ImportError, OSError) as _error:
    BACKEND = "numpy"
    if not isinstance(_error, ModuleNotFoundError):  # that is an installation without a compiler
        warnings.warn(f"fastops runs on NumPy: {_error}. Please install again.", RuntimeWarning, stacklevel=2)
else:
    BACKEND = "cython"
    max_pool_resize, rgb_to_gray = _frames.max_pool_resize, _frames.rgb_to_gray
    gae, discounted_sum = _returns.gae, _returns.discounted_sum
    for _function in (max_pool_resize, rgb_to_gray, gae, discounted_sum):
        _function.__doc__ = getattr(reference, _function.__name__).__doc__

    class RunningMeanStd(reference.RunningMeanStd):  # type: ignore[no-redef]
        __doc__ = reference.RunningMeanStd.__doc__
        _sums = staticmethod(_stats.sums)
        _normalize = staticmethod(_stats.normalize)
