"""What pyproject.toml cannot say: how the Cython modules of fastops are compiled.

`FASTOPS_DEBUG=1 pip install .` builds them with bounds checks on.
"""

import os
import zlib
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("FASTOPS_DEBUG", "0") not in ("", "0")
MODULES = ("_frames", "_returns", "_stats")
# Compiled in, and compared at import: kernels never run beside sources that they were not built from.
SOURCES = [Path("fastops", name) for name in ("_checks.py", "reference.py", *(f"{name}.pyx" for name in MODULES))]
CHECKSUM = zlib.crc32("".join(source.read_text("utf-8") for source in SOURCES).encode())


class BuildExt(build_ext):
    def build_extensions(self) -> None:
        # A fused multiply-add rounds once where OpenCV and NumPy round twice.
        flags = ["/O2"] if self.compiler.compiler_type == "msvc" else ["-O3", "-ffp-contract=off"]
        for extension in self.extensions:
            extension.extra_compile_args = flags
            extension.define_macros = [("FASTOPS_CHECKSUM", f"{CHECKSUM}u")]
            extension.optional = True  # where no compiler is at hand the install succeeds, and fastops runs on NumPy
        super().build_extensions()


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=cythonize(
        [Extension(f"fastops.{name}", [f"fastops/{name}.pyx"]) for name in MODULES],
        compiler_directives={
            "language_level": "3",
            "boundscheck": DEBUG,
            "wraparound": DEBUG,
            "initializedcheck": DEBUG,
            "cdivision": True,
        },
        build_dir="build/cython",
        force=True,  # Cython does not notice that the directives changed
    ),
)
