"""What README, CONTRIBUTING and docs say is so: links lead somewhere, flags exist, commands and examples run."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import budgets
import numpy as np
import pytest
from conftest import ROOT, SCRIPT, SMALL, last_checkpoint

DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*DOCS, ROOT / "CHANGELOG.md"]
NAMES = {path: str(path.relative_to(ROOT)) for path in LINKED}
MEDIA = {".png", ".gif", ".jpg", ".jpeg", ".svg", ".webp", ".mp4", ".webm"}
SCRIPTS = [ROOT / f"rnd_ppo_{name}.py" for name in ("atari", "atari_lstm", "mario")]  # a clone may have copies, too

# Commands that are not run here, by how they begin, and where else they are.
COVERED = {
    "pip install": "CI, test_packages.py",
    "git clone": "needs the network",
    "cd": "nothing to test",
    "pytest": "this",
    "python examples/rnd_ppo_minigrid.py": "needs minigrid; test_examples.py",
    "python examples/rnd_ppo_crafter.py": "needs crafter; test_examples.py",
    "python examples/crafter_score.py": "test_examples.py",
    "ruff": "CI",
    "mypy": "CI",
    "bash .ci/run": "CI itself",
    "pre-commit": "runs what CI runs",
    "tensorboard": "never ends; test_training.py reads the events",
    "tests/sanitize.sh": "needs a compiler with sanitizers",
    "python tests/test_scripts.py": "test_scripts.py, test_stored_diff_is_fresh",
    "python tests/budgets.py": "test_budgets.py",
    "git show": "test_scripts.py holds the scripts together, however they were edited",
    "git merge-file": "as git show",
    "python -m build": "test_packages.py",
    "python -m timeit": "measures torch, nothing of ours",
}
# What is run here, and what makes it short: of an argument given twice the last counts.
TRAIN = f"{SMALL} --num-workers 1 --num-minibatches 4 --update-epochs 1"
SHORT = {
    "train": f"{TRAIN} --total-rollouts 2",
    "resume": f"{SMALL} --num-workers 1 --total-rollouts 4",  # the run to go on from has three rollouts
    "play": "--episodes 1 --max-episode-steps 20 --device cpu",
    "tools/watch.py": "--max-steps 8 --scale 2",
    "tools/plot.py": "",
    "benchmarks/envs.py": "--num-envs 2 --workers 1 --rounds 1 --seconds 0.1",
    "benchmarks/kernels.py": "--seconds 0.01",
    "benchmarks/precision.py": "--num-envs 2 --num-steps 8",
    "benchmarks/mario.py": "--num-envs 2 --rounds 1 --seconds 0.1 --random 0",
    "benchmarks/stop.py": "--num-envs 4 --rounds 1",
    "benchmarks/train.py": "--num-envs 4 --workers 1 --rounds 1 --rollouts 1 --precision fp32 --compile no",
}
# Left out of what is run, with so many values: a display, an account, a minute of compiling, the reader's own file.
LEFT_OUT = {"--render": 0, "--track": 0, "--compile": 0, "--rom": 1}

SCRIPT_NAME = re.compile(r"rnd_ppo(_[a-z0-9]+)+")  # not the underscores behind it in the name of a run's directory
PROGRAM = re.compile(r"(python|pip|uv|conda|torchrun|srun|sbatch|docker|git|curl|wget|apt|brew|make|bash|sh|\$|#)")

PLACEHOLDER = r"(PATH|CHECKPOINT|RUN)$|runs/."  # a checkpoint, a checkpoint, the directory of a run; something in one
# Flags that are not ours.
FOREIGN_FLAGS = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"}  # torchrun
FOREIGN_FLAGS |= {"--no-deps", "--extra-index-url", "--index-url", "--logdir", "--help"}


# === Reading Markdown =================================================================================================


def blocks(path):
    """(language, number of the first line, lines) of each fenced block."""
    found, fence, lines = [], None, []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        match = re.match(r"\s*(`{3,}|~{3,})\s*(\w*)", line)
        if fence is None and match:
            fence, found = match[1], [*found, (match[2], number + 1, lines := [])]
        elif fence is not None and match and match[1].startswith(fence) and not match[2]:
            fence = None
        elif fence is not None:
            lines.append(line)
    assert fence is None, f"{path.name}: a block is not closed"
    return found


def prose(path):
    """The text without fenced blocks."""
    return re.sub(r"^\s*(`{3,}|~{3,}).*?^\s*\1\s*$", "", path.read_text("utf-8"), flags=re.M | re.S)


def links(path):
    text = re.sub(r"(`+)(?!`).*?\1", "", prose(path), flags=re.S)
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\s*\)", text)
    return inline + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.M) + re.findall(r"\b(?:src|href)=[\"']([^\"']+)", text)


def anchors(path):
    """The anchors that GitHub gives a page's headings, and those written as HTML."""
    text, found = prose(path), set()
    for title in re.findall(r"^#{1,6}\s+(.*?)\s*#*$", text, re.M):
        title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        found.add(next(name for i in range(99) if (name := f"{slug}-{i}" if i else slug) not in found))
    return found | set(re.findall(r"\b(?:id|name)=[\"']([^\"']+)", text))


def is_shell(path, lines):
    """Of a block that does not say its language; in docs/ some hold formulas."""
    words = [word for word in " ".join(lines).split() if not re.match(r"[A-Z_]+=", word)]
    return path.parent == ROOT or PROGRAM.fullmatch(words[0]) is not None or shutil.which(words[0]) is not None


def commands():
    """(where, words) of each simple command in the shell blocks, once."""
    found = {}
    for path in DOCS:
        for language, number, lines in blocks(path):
            if language not in ("", "sh", "bash", "console") or (not language and not is_shell(path, lines)):
                continue
            if language == "console":  # what has no prompt is output, unless the line before goes on
                lines = [
                    line.removeprefix("$ ")
                    for i, line in enumerate(lines)
                    if line.startswith("$ ") or (i and lines[i - 1].endswith("\\"))
                ]
            for line in re.sub(r"(^|\s)#.*", "", "\n".join(lines), flags=re.M).replace("\\\n", " ").splitlines():
                lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
                lexer.commenters, lexer.whitespace_split, words = "", True, []
                for word in [*lexer, ";"]:
                    if set(word) <= set("&|;"):
                        found.setdefault(tuple(words), f"{NAMES[path]}:{number}")
                        words = []
                    else:
                        words.append(word)
    return [(where, list(words)) for words, where in found.items() if words]


def assignments(words):
    """How many NAME=VALUE a command begins with."""
    return next(i for i, word in enumerate([*words, ""]) if not re.match(r"\w+=", word))


def kind(words):
    """What SHORT or COVERED calls a command; None: neither knows it."""
    words = words[assignments(words) :]
    text = " ".join(words)
    if re.match(rf"(python (-m )?|torchrun .*\b){SCRIPT_NAME.pattern}\b", text):
        return "play" if "--play" in words else "resume" if "--resume" in words and "auto" not in words else "train"
    if text.startswith("python ") and (words[1] in SHORT or words[1].startswith("tools/")):
        return words[1]
    return next((prefix for prefix in COVERED if f"{text} ".startswith(f"{prefix} ")), None)


def script_of(words):
    """The script that a command runs, or whose run it looks at; the base if it names none."""
    match = SCRIPT_NAME.search(" ".join(words))
    return match[0] if match else SCRIPT.stem


COMMANDS = commands()
RUN = [(where, words) for where, words in COMMANDS if kind(words) not in (None, *COVERED)]


# === Links and sizes ==================================================================================================


@pytest.mark.parametrize("path", LINKED, ids=NAMES.get)
def test_links_lead_somewhere(path):
    for link in links(path):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists() and target.is_relative_to(ROOT.resolve()), f"{link}: no such file"
        if line := re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor):
            assert int(line[line.lastindex]) <= len(target.read_text("utf-8").splitlines()), f"{link}: no such line"
        elif anchor:
            assert anchor in anchors(target), f"{link}: expected one of {sorted(anchors(target))}"


def test_anchors_as_github_names_them(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b_c`: *d*, 1.5\n```\n# no\n```\n## Twice\n## Twice\n## [x y](z.md) & w\n", "utf-8")
    assert anchors(page) == {"a-b_c-d-15", "twice", "twice-1", "x-y--w"}


def test_sizes():
    media = [path for path in (ROOT / "docs").rglob("*") if path.suffix.lower() in MEDIA]
    assert sum(path.stat().st_size for path in media) < 3e6
    large = [path.name for path in (ROOT / "models").rglob("*") if path.is_file() and path.stat().st_size >= 10e6]
    assert not large


# === Names ============================================================================================================


def code(text):
    """What stands between backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def script_names():
    """Names of the scripts: classes and functions, and `Class.attribute` of whatever a class defines or sets."""
    names = set()
    for script in SCRIPTS:
        for node in ast.parse(script.read_text("utf-8")).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            names.add(node.name)
            stored = [inner for inner in ast.walk(node) if isinstance(getattr(inner, "ctx", None), ast.Store)]
            attributes = {inner.name for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef)}
            attributes |= {inner.id for inner in stored if isinstance(inner, ast.Name)}
            attributes |= {inner.attr for inner in stored if isinstance(inner, ast.Attribute)}
            names |= {f"{node.name}.{attribute}" for attribute in attributes}
    return names


@pytest.mark.parametrize("path", DOCS, ids=NAMES.get)
def test_tests_that_are_named_exist(path):
    tests = "".join(test.read_text("utf-8") for test in (ROOT / "tests").glob("*.py"))
    named = set(re.findall(r"\btest_\w+", prose(path))) - {test.stem for test in (ROOT / "tests").glob("*.py")}
    assert not sorted(name for name in named if f"def {name}(" not in tests)


@pytest.mark.parametrize("path", DOCS, ids=NAMES.get)
def test_attributes_that_are_named_exist(path):
    names = script_names()
    dotted = {word for word in code(prose(path)) if re.fullmatch(r"[A-Z]\w*\.\w+", word)}
    assert not sorted(word for word in dotted if word.partition(".")[0] in names and word not in names)


def test_every_place_to_change_a_choice_exists():
    rows = [line for line in prose(ROOT / "docs" / "choices.md").splitlines() if line.startswith("| *change it* |")]
    assert len(rows) > 10
    for row in rows:
        assert all(code(cell) for cell in row.strip("| ").split("|")[1:]), row
        places = {word for word in code(row) if re.fullmatch(r"[A-Z]?\w+(\.\w+)?", word)} - {"forward"}  # a value
        scripts = {path.name for path in SCRIPTS}
        assert not sorted(places - script_names() - scripts), row


def test_how_it_works_follows_the_sections_of_the_script():
    sections = re.findall(r"^# === (\d+\. .*?) =+$", SCRIPT.read_text("utf-8"), re.M)
    assert re.findall(r"^## (\d+\. .*)$", (ROOT / "docs" / "how_it_works.md").read_text("utf-8"), re.M) == sections


def test_the_readme_knows_the_size_of_the_differences():
    text, base = (path.read_text("utf-8") for path in (ROOT / "README.md", SCRIPT))
    said = re.findall(r"\[(\d+) lines\]\(docs/diffs/atari__(\w+)\.diff\)", text)
    assert len(said) == len(SCRIPTS) - 1
    for lines, variant in said:
        [script] = [path for path in SCRIPTS if path.stem.endswith(variant)]
        assert budgets.diff_size(base, script.read_text("utf-8"))[0] == int(lines)


# === Flags ============================================================================================================


def our_flags():
    flags = set()
    for script in SCRIPTS:
        tree = ast.parse(script.read_text("utf-8"))
        [args] = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
        for node in args.body:
            if isinstance(node, ast.AnnAssign):
                name = node.target.id.replace("_", "-")
                flags |= {f"--{name}"} | ({f"--no-{name}"} if ast.unparse(node.annotation) == "bool" else set())
    folders = [ROOT / "tools", ROOT / "benchmarks", ROOT / "examples"]
    for path in [*(path for folder in folders for path in folder.glob("*.py")), ROOT / "tests" / "budgets.py"]:
        flags |= set(re.findall(r"\"(--[a-z][a-z-]*)\"", path.read_text("utf-8")))
    return flags


@pytest.mark.parametrize("path", LINKED, ids=NAMES.get)
def test_flags_exist(path):
    """In a table headed `| NAME | here |` the first column has the flags of others, unless the second is "the same"."""
    text, theirs = [], False
    for line in prose(path).splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")] if line.startswith("|") else []
        theirs = bool(cells) and (theirs or (len(cells) == 2 and cells[1] == "here"))
        text += cells[1:] if theirs and cells[1] != "the same" else [line]
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", "\n".join(text)))
    assert not sorted(named - our_flags() - FOREIGN_FLAGS)


# === Commands =========================================================================================================


def test_every_command_is_run_or_covered():
    """Of those below that are not: run them here (SHORT), or say in COVERED where else they are."""
    assert RUN and [f"{where}: {' '.join(words)}" for where, words in COMMANDS if kind(words) is None] == []


def test_a_commands_script_is_found_in_the_name_of_a_run():
    assert script_of(["python", "tools/plot.py", "runs/Pong-v5__rnd_ppo_atari_lstm__*"]) == "rnd_ppo_atari_lstm"
    assert script_of(["python", "rnd_ppo_mario.py"]) == "rnd_ppo_mario"
    assert script_of(["python", "benchmarks/kernels.py"]) == "rnd_ppo_atari"


def place(folder):
    """A copy of what the commands need: they may write where they like."""
    for path in (*SCRIPTS, *(ROOT / name for name in ("fastops", "tools", "benchmarks", "docs"))):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder)
    for name, source in BUILT.items():
        (folder / name).write_text(source, "utf-8")
    if (ROOT / "models").is_dir():
        (folder / "models").mkdir()
        for path in (ROOT / "models").iterdir():
            (folder / "models" / path.name).symlink_to(path)
    return folder


def execute(command, cwd, env=()):
    env = {**os.environ, "MPLBACKEND": "Agg", **dict(env), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    """The directory of a small run of a script, three rollouts, with its newest checkpoint only."""
    found = {}

    def run(script):
        if script == SCRIPT.stem:
            return last_checkpoint(request.getfixturevalue("base_run")[1]).parent
        if script not in found:
            cwd = place(tmp_path_factory.mktemp(script))
            trains = [words for _, words in RUN if words[:2] == ["python", f"{script}.py"] and kind(words) == "train"]
            env, command = shortened(trains[0], run)
            execute([*command, "--total-rollouts", "3"], cwd, env.items())
            found[script] = last_checkpoint(cwd / "runs").parent
        return found[script]

    return run


def substitute(word, run):
    """A placeholder as what it stands for in the directory `run`."""
    name = word.rpartition("/")[2]
    if word in ("PATH", "CHECKPOINT") or (name.endswith(".pt") and not (run / name).exists()):
        return last_checkpoint(run.parent)
    return run / name if Path(name).suffix in (".pt", ".json") else run


def shortened(words, run_of):
    """The environment and the argument list of a command as it is run here; `run_of(script)`: the run to take."""
    env = dict(word.split("=", 1) for word in words[: assignments(words)])
    words = words[assignments(words) :]
    if ">" in words:
        words = words[: words.index(">")]
    what = kind(words)
    left_out = {i + k for i, word in enumerate(words) for k in range(LEFT_OUT.get(word, -1) + 1)}
    words = [
        substitute(word, run_of(script_of(words)))
        if re.match(PLACEHOLDER, word)
        else re.sub(r"^HOST(:\d+)?$", "localhost:0", word)
        for i, word in enumerate(words)
        if i not in left_out
    ]
    if words[0] == "torchrun":  # on this machine, at most two processes, on any free port
        words = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", *words[1:]]
        for i, word in enumerate(words):
            if words[i - 1] == "--nproc-per-node":
                words[i] = str(min(int(word), 2))
            if words[i - 1] == "--nnodes":
                words[i] = "1"
            if words[i - 1] == "--max-restarts":  # a restart would hide a failure
                words[i] = "0"
        if "--rdzv-endpoint" not in words:
            words[5:5] = ["--rdzv-endpoint", "localhost:0"]
    else:
        words[0] = sys.executable
    return env, [*words, *SHORT.get(what, "").split()]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("where", "words"), RUN, ids=[f"{where}-{' '.join(words[:4])}" for where, words in RUN])
def test_command(where, words, runs, tmp_path):
    if "rnd_ppo_mario" in " ".join(words) and not all(map(find_spec, ("stable_retro", "gym_super_mario_bros"))):
        pytest.skip("needs stable-retro and gym-super-mario-bros")
    place(tmp_path)

    def run_of(script):
        target = tmp_path / "runs" / runs(script).name
        if not target.exists():  # only the newest checkpoint, and what is not one
            ignored = [path.name for path in sorted(runs(script).glob("checkpoint_*.pt"))[:-1]]
            shutil.copytree(runs(script), target, ignore=shutil.ignore_patterns(*ignored))
        return target

    env, command = shortened(words, run_of)
    output = execute(command, tmp_path, env.items())
    if kind(words) in ("train", "resume"):
        assert list(tmp_path.glob("runs/*/checkpoint_00000[24].pt")), output
    written = [word for i, word in enumerate(words) if words[i - 1] in ("--video", "--out", "--json", "--rooms")]
    assert all((tmp_path / name).exists() or list(tmp_path.glob(f"{Path(name).stem}-*")) for name in written)
    shutil.rmtree(tmp_path)  # checkpoints are large


# === Examples in Python ===============================================================================================


def examples(path):
    """(first line's number, file name or "", source) of each block in Python; the name is its first line's comment."""
    for language, number, lines in blocks(path):
        if language in ("python", "py"):
            name = re.match(r"# (?:file: )?([\w./-]+\.py)\b", lines[0] if lines else "")
            yield number, name[1] if name else "", "\n".join(lines) + "\n"


def definition(script, name):
    """First and last line of a class or function, counted from 1."""
    tree = ast.parse((ROOT / script).read_text("utf-8"))
    [node] = [node for node in tree.body if getattr(node, "name", "") == name]
    return node.lineno, node.end_lineno


def built(source):
    """The file that a block stands for: the block itself, unless its first line says how to make the file with it."""
    first, _, rest = source.partition("\n")
    if match := re.fullmatch(r"# \w+\.py: these lines, then ([\w, ]+) from (\w+\.py)", first):
        lines = (ROOT / match[2]).read_text("utf-8").splitlines()
        spans = [definition(match[2], name) for name in match[1].split(", ")]
        return "\n\n\n".join([source.rstrip(), *("\n".join(lines[begin - 1 : end]) for begin, end in spans)]) + "\n"
    if match := re.fullmatch(r"# \w+\.py: (\w+\.py) with this class (\w+)", first):
        lines = (ROOT / match[1]).read_text("utf-8").splitlines()
        begin, end = definition(match[1], match[2])
        lines[begin - 1 : end] = rest.rstrip().splitlines()
        return "\n".join(lines) + "\n"
    return source


# Files that the pages make from a script: name -> source.
BUILT = {name: built(source) for path in DOCS for _, name, source in examples(path) if built(source) != source}
# Copies of a script with another class Game, and the game that the page plays with each.
GAMES = {
    words[1]: words[words.index("--env-id") + 1]
    for _, words in COMMANDS
    if len(words) > 1 and words[1] in BUILT and "--env-id" in words
}


@pytest.mark.parametrize("path", DOCS, ids=NAMES.get)
def test_examples_compile(path):
    found = list(examples(path))
    for number, name, source in found:
        compile(built(source), f"{NAMES[path]}:{number} {name}", "exec")
        assert name or "# runs in the tests" not in source, f"{NAMES[path]}:{number}: expected a comment with a name"
    names = [name for page in DOCS for _, name, _ in examples(page) if name]
    assert len(names) == len(set(names)), names


EXAMPLES = [(path, name) for path in DOCS for _, name, source in examples(path) if "# runs in the tests" in source]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("path", "name"), EXAMPLES, ids=[f"{NAMES[path]}-{name}" for path, name in EXAMPLES])
def test_example_runs(path, name, tmp_path):
    """Beside the scripts, as in a clone, and beside the page's other examples."""
    place(tmp_path)
    for _, other, source in examples(path):
        if other:
            (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / other).write_text(built(source), "utf-8")
    execute([sys.executable, name], tmp_path)
    shutil.rmtree(tmp_path)


# === A game of one's own ==============================================================================================


def load(name, folder):
    """The module of a file that a page makes."""
    path = folder / name
    path.write_text(BUILT[name], "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def uses_of_a_game():
    """What the base script, outside of the class Game, reads of the class and its objects."""
    tree = ast.parse(SCRIPT.read_text("utf-8"))
    outside = [node for node in tree.body if getattr(node, "name", "") != "Game"]
    nodes = [node for top in outside for node in ast.walk(top) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if ast.unparse(node.value).rpartition(".")[2] in ("game", "Game")}


def test_the_pages_make_copies_with_another_game():
    assert {"rnd_ppo_maze.py", "rnd_ppo_gym.py"} <= set(GAMES)


def test_the_page_lists_exactly_what_a_game_must_offer():
    text = (ROOT / "docs" / "copying.md").read_text("utf-8")
    table = text.partition("What a `Game` must offer:\n\n")[2].partition("\n\n")[0]
    listed = re.findall(r"^\| `(\w+)", table, re.M)
    assert sorted(listed) == sorted(uses_of_a_game() | {"Game"})


@pytest.mark.parametrize("name", GAMES)
def test_the_page_replaces_one_class_and_nothing_else(name):
    [block] = [source for path in DOCS for _, other, source in examples(path) if other == name]
    [node] = ast.parse(block).body
    assert isinstance(node, ast.ClassDef)
    assert node.name == "Game"


@pytest.mark.parametrize("name", GAMES)
def test_a_copys_game_continues_from_its_state(name, tmp_path):
    """An Env that gets the state of another shows the same frames and rewards; the state can be saved."""
    script = load(name, tmp_path)
    first, second = (script.Env(GAMES[name], index, seed=3, max_episode_steps=40) for index in (0, 1))
    assert all(hasattr(first.game, attribute) for attribute in uses_of_a_game())
    actions = np.random.default_rng(0).integers(len(first.game.actions), size=150).tolist()

    def play(env, actions):
        outcomes, frame = [], np.zeros((84, 84), np.uint8)
        for action in actions:
            reward, done, _ = env.step(action, frame)
            if done:
                env.reset(frame)
            outcomes.append((reward, done, frame.tobytes()))
        return outcomes

    before = play(first, actions[:70])
    assert len({frame for _, _, frame in before}) > 2  # something moves
    play(second, actions[:10])
    state = first.get_state()
    script.check_plain(state, "state")
    second.set_state(state)
    after = play(first, actions[70:])
    assert after == play(second, actions[70:])
    assert any(done for _, done, _ in after)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("rnd_ppo_gym.py", "", ""),
        ("rnd_ppo_maze.py", "return [self.row, self.column]", "return [0, 0]"),  # a state that is not complete
        ("rnd_ppo_maze.py", "rnd=self.rnd.state_dict(),", "rnd=RND().state_dict(),"),  # weights that are not saved
        ("rnd_ppo_maze.py", "carry=self.rnd.carry.tolist(),", "carry=[0.0] * 4,"),
    ],
)
def test_the_pages_check_of_a_copy_finds_what_is_not_saved(name, old, new, tmp_path):
    """With another copy than the page's, too: the two lines that name script and game are changed."""
    [check] = [source for path in DOCS for _, other, source in examples(path) if other == "check_copy.py"]
    check = check.replace("rnd_ppo_maze", Path(name).stem).replace("Maze-1", GAMES[name])
    assert old in BUILT[name]
    (tmp_path / name).write_text(BUILT[name].replace(old, new) if old else BUILT[name], "utf-8")
    (tmp_path / "check_copy.py").write_text(check.replace("obs_norm", "int_return_filter='forward', obs_norm"), "utf-8")
    done = subprocess.run([sys.executable, "check_copy.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if old:
        assert done.returncode == 1 and "AssertionError: these differ after a stop: " in done.stderr
    else:
        assert done.returncode == 0 and "a stopped run continues exactly" in done.stdout, done.stderr


@pytest.mark.parametrize("name", GAMES)
def test_a_copy_refuses_another_game_in_one_line(name, tmp_path):
    (tmp_path / name).write_text(BUILT[name], "utf-8")
    command = [sys.executable, name, "--env-id", "Tetris-3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert re.fullmatch(r"error: --env-id: expected .*Tetris-3.*\n", done.stderr), done.stderr
