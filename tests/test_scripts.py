"""The scripts repeat each other by design; these tests hold them together."""

import ast
import difflib
import itertools
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import budgets
import pytest

ROOT = Path(__file__).parent.parent
BASE = "rnd_ppo_atari"
VARIANTS = {
    "rnd_ppo_atari_lstm": dict(
        lines=90, hunks=12, varying={"Args", "Agent", "Rollout", "collect", "play_episode", "train"}
    ),
    "rnd_ppo_mario": dict(lines=170, hunks=8, varying={"Args", "Game"}),
    "rnd_ppo_minigrid": dict(lines=90, hunks=5, varying={"Args", "Game"}),
    "rnd_ppo_crafter": dict(lines=90, hunks=6, varying={"Args", "Game"}),
}
PACKAGES = {
    "rnd_ppo_mario": ("stable_retro", "gym_super_mario_bros"),
    "rnd_ppo_minigrid": ("minigrid",),
    "rnd_ppo_crafter": ("crafter",),
}
SCRIPTS = [BASE, *VARIANTS]
# Below the line stands what users need besides the algorithm: it may be longer, but not denser.
ALGORITHM, LINES, FUNCTION, LOOP, TOKENS = 728, 1695, 60, 30, 12.5
SECTIONS = [
    "Arguments",
    "The game",
    "Networks",
    "Rollout",
    "Update",
    "Training",
    "Workers",
    "Log",
    "Checkpoints",
    "Play",
    "Start",
]


def source(name: str) -> str:
    [path] = (path for path in (ROOT / f"{name}.py", ROOT / "examples" / f"{name}.py") if path.exists())
    return path.read_text()


def definitions(name: str) -> dict[str, str]:
    text = source(name)
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return {node.name: ast.get_source_segment(text, node) or "" for node in nodes}


def place(name: str, line: int) -> str:
    """The function or class that a line of a script is in, as `Class.function`; "" outside of all."""
    inside, nodes = [], ast.parse(source(name)).body
    while found := [node for node in nodes if hasattr(node, "name") and node.lineno <= line <= (node.end_lineno or 0)]:
        inside.append(found[0].name)
        nodes = found[0].body
    return ".".join(inside)


def diff(name: str) -> list[str]:
    """The lines of `diff -U0` with the place of each change instead of line numbers, which change with every edit."""
    lines = difflib.unified_diff(source(BASE).splitlines(), source(name).splitlines(), n=0, lineterm="")
    changes = []
    for line in itertools.islice(lines, 2, None):
        if numbers := re.match(r"@@ -\d+(?:,\d+)? \+(\d+)", line):
            line = f"@@ {place(name, int(numbers[1]))}".rstrip()
        changes.append(line)
    return changes


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_sections_are_the_same_in_all_scripts(name):
    expected = [f"# === {i}. {title} " for i, title in enumerate(SECTIONS, 1)]
    found = re.findall(r"^# === .*$", source(name), re.M)
    assert [line.rstrip("=") for line in found] == expected
    assert {len(line) for line in found} == {120}


def test_the_algorithm_comes_first_and_is_short():
    assert budgets.end_of_algorithm(source(BASE)) <= ALGORITHM


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_not_dense(name):
    text = source(name)
    extra = VARIANTS[name]["lines"] if name in VARIANTS else 0
    assert len(text.splitlines()) <= LINES + extra
    assert budgets.tokens_per_line(text) <= TOKENS
    assert budgets.longest_function(text)[0] <= FUNCTION
    assert 0 < budgets.training_loop(text) <= LOOP


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_reader_meets_nothing_before_it_is_introduced(name):
    """Up to the end of `train`, a name of the script is defined above its use, or announced by the docstring."""
    tree = ast.parse(source(name))
    end = budgets.end_of_algorithm(source(name))
    announced = set(re.findall(r"\w+", ast.get_docstring(tree) or ""))
    definitions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    introduced = set()
    for node in tree.body:
        if node.lineno >= end:
            break
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            introduced.add(node.name)
        used = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)} & definitions
        assert used <= introduced | announced, f"line {node.lineno}: {used - introduced - announced}"
    assert "train" in introduced


@pytest.mark.parametrize("name", VARIANTS)
def test_the_difference_to_the_base_is_small(name):
    lines, hunks = budgets.diff_size(source(BASE), source(name))
    assert 0 < lines <= VARIANTS[name]["lines"]
    assert 0 < hunks <= VARIANTS[name]["hunks"]


@pytest.mark.parametrize("name", VARIANTS)
def test_same_names_are_the_same(name):
    """A function of the same name is byte-identical unless it is listed as varying, and what is listed does vary."""
    base, variant = definitions(BASE), definitions(name)
    assert {key for key in base if variant.get(key) != base[key]} == VARIANTS[name]["varying"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fifth_of_the_lines_is_prose(name):
    lines = source(name).splitlines()
    prose = sum(line.lstrip().startswith("#") or "  # " in line for line in lines)
    prose += len(budgets.docstring_lines(source(name)))
    assert prose >= len(lines) / 5, f"{prose} of {len(lines)}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_nothing_local_but_fastops(name):
    local = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    nodes = [node for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} & local == {"fastops"}


@pytest.mark.parametrize("name", VARIANTS)
def test_docstring_says_what_differs(name):
    last = (ast.get_docstring(ast.parse(source(name))) or "").split("\n\n")[-1]
    assert last.startswith(f"Variant of {BASE}.py: ")
    assert ast.get_docstring(ast.parse(source(BASE))) in (ast.get_docstring(ast.parse(source(name))) or "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_main_is_two_lines(name):
    assert source(name).endswith('\n\nif __name__ == "__main__":\n    sys.exit(main())\n')


@pytest.mark.parametrize("name", VARIANTS)
def test_stored_diff_is_fresh(name):
    """docs/diffs shows accidental divergence in review. To renew it: python tests/test_scripts.py"""
    stored = ROOT / "docs" / "diffs" / f"atari__{name.rpartition('_')[2]}.diff"
    assert stored.read_text().splitlines() == diff(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_copy_trains_alone(name, tmp_path):
    """The script in an empty directory, with fastops installed, trains two rollouts of the real game and plays."""
    if missing := [package for package in PACKAGES.get(name, ()) if find_spec(package) is None]:
        pytest.skip(f"needs {', '.join(missing)}")
    (tmp_path / f"{name}.py").write_text(source(name))
    small = ["--num-envs=4", "--num-steps=8", "--obs-norm-rollouts=1", "--total-rollouts=2"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    run = dict(cwd=tmp_path, capture_output=True, text=True, timeout=200, env=env)
    done = subprocess.run([sys.executable, f"{name}.py", *small], **run)
    assert done.returncode == 0, done.stderr
    assert "fastops in cython" in done.stdout
    [path] = tmp_path.glob("runs/*/checkpoint_000002.pt")
    play = f"--play {path} --episodes 1 --max-episode-steps 20".split()
    done = subprocess.run([sys.executable, f"{name}.py", *play], **run)
    assert done.returncode == 0, done.stderr
    assert "length 20" in done.stdout


if __name__ == "__main__":
    for variant in VARIANTS:
        path = ROOT / "docs" / "diffs" / f"atari__{variant.rpartition('_')[2]}.diff"
        path.write_text("\n".join(diff(variant)) + "\n")
