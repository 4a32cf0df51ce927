"""What leaves the repository: the built packages, and the script with the folder fastops copied elsewhere."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPT

PROJECT = (ROOT / "pyproject.toml").read_text("utf-8")
VERSION = re.search(r'^version = "(.+)"$', PROJECT, re.M)[1]
MODULES = re.findall(r'"(\w+)"', re.search(r"^py-modules = \[(.*)\]$", PROJECT, re.M)[1])
KERNELS = [path.stem for path in (ROOT / "fastops").glob("*.pyx")]


def run(*command, **options):
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, env=env, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_versions_agree():
    assert sorted(MODULES) == ["rnd_ppo_atari", "rnd_ppo_atari_lstm", "rnd_ppo_mario"]
    for name in MODULES:
        assert f'\n__version__ = "{VERSION}"\n' in (ROOT / f"{name}.py").read_text("utf-8")
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^## \[(\d.*)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)[1] == VERSION


def environment(folder):
    """The interpreter of a virtual environment with this one's packages, but not with what is installed editable."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = next(path for path in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if path.exists())
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "parent.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that was built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("packages")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs a clone, to know the project's files")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
    [sdist], [wheel] = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.mark.slow
@pytest.mark.long
def test_contents(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {re.sub(r"\..*$", "", name) for name in names if name.endswith((".so", ".pyd"))}
    assert modules == {f"fastops/{name}" for name in KERNELS} and "-py3-none-any" not in wheel.name
    sources = {f"{name}.py" for name in MODULES} | {f"fastops/{name}.pyx" for name in KERNELS} | {"fastops/py.typed"}
    sources |= {f"fastops/{path.name}" for path in (ROOT / "fastops").glob("*.py")}
    assert {name for name in names if not name.endswith((".so", ".pyd"))} == sources
    with tarfile.open(sdist) as archive:
        contained = {name.partition("/")[2] for name in archive.getnames()}
    assert {*sources, "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"} <= contained
    roms = [name for name in names | contained if name.lower().endswith((".nes", ".bin", ".a26", ".rom", ".zip"))]
    compiled = [name for name in contained if name.endswith((".so", ".pyd", ".c", ".pyc"))]
    assert roms == compiled == []


@pytest.mark.slow
@pytest.mark.long
def test_wheel_works_from_anywhere(built, tmp_path):
    python, empty = environment(tmp_path / "venv"), tmp_path / "empty"
    empty.mkdir()
    how = ["install", "-q", "--no-deps", "--no-index", "--force-reinstall", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, *how, built[1])
    code = "import {0} as m; print(m.__version__, m.fastops.BACKEND, m.__file__)"
    for name in MODULES:
        version, backend, file = run(python, "-c", code.format(name), cwd=empty).split(maxsplit=2)
        assert (version, backend) == (VERSION, "cython") and Path(file.strip()).is_relative_to(tmp_path)
        assert "--predictor-proportion" in run(python, "-m", name, "--help", cwd=empty)
    assert list(empty.iterdir()) == []


@pytest.mark.slow
@pytest.mark.long
def test_the_oldest_packages_that_are_allowed(tmp_path):
    """The lower bounds in pyproject.toml, but for torch and NumPy, which are too large to be fetched here."""
    bounds = re.findall(r'^    "(\S+)>=(\S+)",$', PROJECT, re.M)
    oldest = [f"{name}=={version}" for name, version in bounds if name not in ("torch", "numpy")]
    assert len(oldest) == 4
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "oldest", *oldest)
    environment = dict(os.environ, PYTHONPATH=str(tmp_path / "oldest"), OMP_NUM_THREADS="1")
    for rollouts in (1, 2):
        small = f"--num-envs 4 --num-steps 8 --obs-norm-rollouts 1 --total-rollouts {rollouts} --max-episode-steps 5"
        command = [sys.executable, SCRIPT, *small.split(), "--num-workers", "1", "--resume", "auto"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("runs/*/checkpoint_000002.pt")
    assert list(path.parent.glob("*tfevents*"))
    code = "import importlib.metadata as m; print(*(m.version(name) for name in %r))" % [name for name, _ in bounds]
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    versions = dict(zip([name for name, _ in bounds], found.stdout.split(), strict=True))
    assert all(versions[pin.split("==")[0]].startswith(pin.split("==")[1]) for pin in oldest)


@pytest.mark.slow
@pytest.mark.long
def test_script_and_folder_without_a_compiler(tmp_path):
    """Alone in a directory, nothing compiled, nothing installed: trains a rollout of the real game on NumPy."""
    python, folder = environment(tmp_path / "venv"), tmp_path / "copy"
    if Path(sysconfig.get_path("purelib"), "fastops").exists():
        pytest.skip("fastops is installed, not editable: its compiled modules would be found")
    shutil.copytree(ROOT / "fastops", folder / "fastops", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    shutil.copy(SCRIPT, folder)
    assert run(python, "-c", "import fastops; print(fastops.BACKEND)", cwd=folder) == "numpy\n"
    small = "--num-envs 4 --num-steps 8 --obs-norm-rollouts 1 --total-rollouts 1 --num-workers 1 --device cpu"
    assert "fastops in numpy" in run(python, SCRIPT.name, *small.split(), cwd=folder)
    assert list(folder.glob("runs/*/checkpoint_000001.pt"))
