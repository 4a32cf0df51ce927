"""The table of budgets against files counted by hand."""

import os
import subprocess

import budgets
import pytest
from conftest import ROOT

SOURCE = '''"""A docstring
of two lines."""

import os  # 2 tokens; a comment does not count


class Fields:
    """One."""

    size: int = 3
    """A docstring below a field."""

    def method(self):
        """Three tokens follow."""
        x = f"{self.size} {f'{os.sep}'}"
        return x


def train(text="a string that is not a docstring"):
    for i in range(3):
        print(
            i,
        )
    while text:
        text = ""
'''
TOKENS_PER_LINE = [2, 3, 5, 6, 3, 2, 8, 8, 2, 2, 1, 3, 3]


def test_tokens_are_those_of_the_code():
    """No comment, docstring, line end or indentation counts, and an f-string counts once in every version of Python."""
    lines = [token.start[0] for token in budgets.code_tokens(SOURCE)]
    assert [lines.count(line) for line in sorted(set(lines))] == TOKENS_PER_LINE
    assert budgets.tokens_per_line(SOURCE) == sum(TOKENS_PER_LINE) / len(TOKENS_PER_LINE)


def test_functions_and_the_loop_are_counted_with_their_first_and_last_line():
    assert budgets.longest_function(SOURCE) == (7, "train")
    assert budgets.training_loop(SOURCE) == 4
    assert budgets.training_loop("x = 1\n") is None and budgets.longest_function("x = 1\n") == (0, "")


def test_a_diff_has_lines_and_hunks():
    """Changes with at most six equal lines between them are one hunk, as on screen."""
    assert budgets.diff_size("a\nb\nc\nd\n", "a\nB\nc\nd\ne\n") == (3, 1)
    assert budgets.diff_size("a\n" + "b\n" * 7, "A\n" + "b\n" * 7 + "c\n") == (3, 2)
    assert budgets.diff_size("a\n", "a\n") == (0, 0)


def test_the_table_has_a_row_for_each_script(capsys):
    assert budgets.main([]) == 0
    head, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["file", "lines", "algorithm", "tokens", "function", "loop", "diff", "hunks"]
    assert [row[0] for row in rows] == sorted(path.name for path in ROOT.glob("rnd_ppo_*.py"))
    for row in rows:
        text = (ROOT / row[0]).read_text("utf-8")
        assert row[1] == str(text.count("\n"))
        assert text.splitlines()[int(row[2]) - 1].startswith("# === 7. ")
        assert (row[-1] == "-") == (row[0] == budgets.BASE)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with two commits of a script, the second one longer."""
    monkeypatch.setattr(budgets, "ROOT", tmp_path)
    who = dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "x@x")
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # a hook's would lead to its own repository
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    for tag, text in (("old", SOURCE), ("new", SOURCE + "\n\nx = 1\n")):
        (tmp_path / "rnd_ppo_atari.py").write_text(text)
        for command in ("init -q .", "add .", "commit -q -m x", f"tag {tag}"):
            subprocess.run(["git", *command.split()], cwd=tmp_path, env={**os.environ, **who}, check=True)
    return tmp_path


def test_before_and_after_are_two_commits(repository, capsys):
    (repository / "rnd_ppo_atari.py").write_text("not committed\n")
    assert budgets.main(["--at", "old", "--at", "new"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    lines = SOURCE.count("\n")
    assert [row[:2] for row in rows] == [["old:rnd_ppo_atari.py", str(lines)], ["new:rnd_ppo_atari.py", str(lines + 3)]]
    assert budgets.main(["--at", "never"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
