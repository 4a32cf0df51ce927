"""The loops of RND-PPO that are slow in NumPy, in Cython. Where no compiler is available, they run in NumPy.

    max_pool_resize(frame_a, frame_b, out, palette=None)    two Atari frames -> one 84x84 observation
    rgb_to_gray(rgb, out)                                   a color frame -> gray, for emulators without a gray screen
    gae(rewards, values, dones, last_value, gamma, lam)     generalised advantage estimation
    discounted_sum(rewards, carry, gamma, reverse)          discounted running sums of rewards
    RunningMeanStd(shape=(), count=1e-4)                    running mean and variance; normalise and clip
    ATARI_GRAYS                                             the gray of each color of ALE's screens, uint8 (256,)
    BACKEND                                                 "cython" or "numpy"; both give the same bits

Arrays over time are (T, N): T steps of N environments. The functions are documented in reference.py.
"""

import pkgutil
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType

from . import reference
from .reference import ATARI_GRAYS, RunningMeanStd, discounted_sum, gae, max_pool_resize, rgb_to_gray

__all__ = ["ATARI_GRAYS", "BACKEND", "RunningMeanStd", "discounted_sum", "gae", "max_pool_resize", "rgb_to_gray"]

# A script in the repository's root imports this folder even if fastops is installed. The compiled modules of the
# installed one are found through this path.
__path__ = pkgutil.extend_path(__path__, __name__)


def _load(name: str) -> ModuleType:
    """Import a compiled module, and refuse it if it was not built from the source beside this file."""
    module = import_module(f"{__name__}.{name}")
    source = Path(__file__).with_name(f"{name}.pyx")
    built_from = getattr(module, "SOURCE", None)  # the text of its source, see setup.py
    if built_from != source.read_text("utf-8"):
        raise ImportError(f"{module.__file__} was not built from {source}")
    return module


try:
    _frames, _returns, _stats = _load("_frames"), _load("_returns"), _load("_stats")
except ModuleNotFoundError:  # nothing is compiled
    BACKEND = "numpy"
except (ImportError, OSError) as _error:
    BACKEND = "numpy"
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
