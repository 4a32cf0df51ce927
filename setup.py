"""Compile the Cython modules of fastops. pyproject.toml has everything else.

`FASTOPS_DEBUG=1 pip install .` compiles them with bounds checks.
"""

import os
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("FASTOPS_DEBUG", "0") not in ("", "0")
# GCC and Clang may otherwise fuse a product and a sum, which rounds once where OpenCV and NumPy round twice. MSVC fuses
# nothing, and its default is its highest level.
FLAGS = [] if sys.platform == "win32" else ["-O3", "-ffp-contract=off"]


def extension(name: str) -> Extension:
    """The module `fastops.name`, built from a copy of its source with one more line: `SOURCE = "..."`, the whole text.

    fastops/__init__.py compares it with the source beside it and refuses a module that was built from another.
    """
    text = Path("fastops", f"{name}.pyx").read_text("utf-8")
    copy = Path("build", "fastops", f"{name}.pyx")
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(f"{text}\nSOURCE = {text!r}\n", "utf-8")
    return Extension(f"fastops.{name}", [str(copy)], extra_compile_args=FLAGS)


extensions = cythonize(
    [extension(name) for name in ("_frames", "_returns", "_stats")],
    compiler_directives={
        "language_level": "3",
        "boundscheck": DEBUG,
        "wraparound": DEBUG,
        "initializedcheck": DEBUG,
        "cdivision": True,
    },
    force=True,  # Cython does not notice when only the directives change
)
for module in extensions:
    module.optional = True  # where no compiler is available, the installation succeeds and fastops runs on NumPy

setup(ext_modules=extensions)
