"""How long and how dense the scripts are, and how far from the base script, as a table.

    python tests/budgets.py                                the scripts
    python tests/budgets.py --at ca2155c --at HEAD         before and after: the scripts at two commits
    python tests/budgets.py benchmarks/*.py tools/*.py     any other files

lines        all lines of the file
algorithm    the line of the heading `# === 7.`, where the algorithm ends
tokens       tokens per code line; comments, docstrings, line ends and indentation do not count
function     lines of the longest function or method
loop         lines of the longest loop of `train`
diff, hunks  changed lines between the base script and this one, and the hunks of `diff -u`
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tempfile
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
BASE = "rnd_ppo_atari.py"
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def docstring_lines(text: str) -> set[int]:
    """Numbers of the lines that docstrings cover, those below the fields of a dataclass included."""
    numbers: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            numbers.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return numbers


def code_tokens(text: str) -> list[tokenize.TokenInfo]:
    """The tokens that count. An f-string is one token, although Python 3.12 and later take it apart."""
    prose = docstring_lines(text)
    tokens = []
    depth = 0  # of nested f-strings
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_END":
            depth -= 1
        elif depth == 0 and token.type not in LAYOUT and token.start[0] not in prose:
            tokens.append(token)
        if kind == "FSTRING_START":
            depth += 1
    return tokens


def tokens_per_line(text: str) -> float:
    tokens = code_tokens(text)
    lines = {token.start[0] for token in tokens}
    return len(tokens) / max(1, len(lines))


def functions(text: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def longest_function(text: str) -> tuple[int, str]:
    """Lines and name."""
    return max(((length(function), function.name) for function in functions(text)), default=(0, ""))


def training_loop(text: str) -> int | None:
    """Lines of the longest loop of `train`; None if there is none."""
    trains = [function for function in functions(text) if function.name == "train"]
    loops = [node for train in trains for node in ast.walk(train) if isinstance(node, ast.For | ast.While)]
    return max(map(length, loops), default=None)


def end_of_algorithm(text: str) -> int | None:
    """The line of the heading of section 7; None if the file is not one of the scripts."""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("# === 7. "):
            return number
    return None


def diff_size(base: str, text: str) -> tuple[int, int]:
    """Changed lines, and the hunks in which `diff -u` shows them."""
    with tempfile.TemporaryDirectory() as folder:
        a, b = Path(folder) / "a", Path(folder) / "b"
        a.write_text(base, "utf-8")
        b.write_text(text, "utf-8")
        plain = subprocess.run(["diff", a, b], capture_output=True, text=True).stdout
        unified = subprocess.run(["diff", "-u", a, b], capture_output=True, text=True).stdout
    return len(re.findall(r"^[<>]", plain, re.M)), len(re.findall(r"^@@", unified, re.M))


def read(path: Path, commit: str) -> str:
    """The text of a file, now or at a commit."""
    if not commit:
        return path.read_text("utf-8")
    name = path.resolve().relative_to(ROOT.resolve()).as_posix()
    command = ["git", "show", f"{commit}:{name}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, encoding="utf-8").stdout


def row(path: Path, commit: str) -> list[str]:
    text = read(path, commit)
    lines, name = longest_function(text)
    algorithm = end_of_algorithm(text)
    loop = training_loop(text)
    changed: int | str = "-"
    hunks: int | str = "-"
    if algorithm and path.name != BASE:
        changed, hunks = diff_size(read(ROOT / BASE, commit), text)
    return [
        f"{commit}:{path.name}" if commit else path.name,
        str(len(text.splitlines())),
        str(algorithm or "-"),
        f"{tokens_per_line(text):.1f}",
        f"{name} {lines}",
        str(loop or "-"),
        str(changed),
        str(hunks),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: the scripts")
    parser.add_argument("--at", action="append", metavar="COMMIT", help="as they were at a commit; can be repeated")
    args = parser.parse_args(argv)
    files = args.files or sorted(ROOT.glob("rnd_ppo_*.py"))

    rows = [["file", "lines", "algorithm", "tokens", "function", "loop", "diff", "hunks"]]
    try:
        for commit in args.at or [""]:
            rows += [row(path, commit) for path in files]
    except (OSError, ValueError, SyntaxError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {error.stderr.strip()}", file=sys.stderr)
        return 2

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
