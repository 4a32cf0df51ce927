#!/bin/sh
# Build fastops with AddressSanitizer and UndefinedBehaviorSanitizer into a temporary folder and run its tests on that
# build. Needs GCC. Arguments go to pytest.
#
#     tests/sanitize.sh                                  the plain loops
#     SANITIZE_FLAGS= tests/sanitize.sh                  with the second version of the loops for AVX2
#     FASTOPS_DEBUG=1 tests/sanitize.sh                  with Cython's own bounds checks on top
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

cp -r "$root/fastops" "$root/setup.py" "$root/pyproject.toml" "$build"
rm -f "$build"/fastops/*.so
cd "$build"
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1"
CC=${CC:-gcc} CFLAGS="$flags ${SANITIZE_FLAGS--DFASTOPS_NO_CLONES}" LDFLAGS="-fsanitize=address,undefined" \
    python setup.py --quiet build_ext --inplace

# Python itself is not built with ASan, so its runtime comes first. Leaks are not looked for: Python has its own at exit,
# and freed memory in quarantine looks like one to the test that counts pages.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONPATH=$build PYTHONDONTWRITEBYTECODE=1 PYTHONMALLOC=malloc
python -c "import fastops; print(fastops.BACKEND, fastops.__file__); assert fastops.BACKEND == 'cython'"
python -m pytest -q --capture=sys -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" -m "not slow" -k "not leak" \
    "$root/tests/test_fastops.py" "$root/tests/test_fastops_fuzz.py" "$@"
