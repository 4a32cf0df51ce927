"""What a run shows: on a terminal of 80 columns, before the emulators start, and at its end."""

import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import SCRIPT
from runs import QUICK, Terminal, die

import rnd_ppo_atari as script


def bars(terminal, total):
    """The states of the progress bar, oldest first."""
    return [line for line in re.split(r"[\r\n]+", terminal.shown()) if re.match(rf"\d+/{total} return", line)]


def test_a_terminal_of_80_columns_shows_bonus_and_entropy_and_may_be_resized_and_closed(start):
    """The bar fits the terminal, also another size, most important first. When the terminal goes, the run is saved."""
    terminal = Terminal(80)
    run = start(f"{QUICK} --total-rollouts 30000 --save-interval 1000 --log-interval 1000", terminal=terminal)

    def bars_after(count):
        before = len(bars(terminal, 30000))
        run.until(lambda: len(bars(terminal, 30000)) >= before + count)
        return bars(terminal, 30000)[before:]

    for bar in bars_after(4):
        assert re.match(r"\d+/30000 return \S+ best \S+ rooms \S+ bonus \S+ entropy \d+\.\d+ ", bar), bar
        assert len(bar.rstrip()) <= 80, bar
    for columns, complete in ((40, False), (120, True)):
        terminal.resize(columns)
        for bar in bars_after(4)[2:]:
            assert len(bar.rstrip()) <= columns, bar
            assert ("left" in bar and "steps/s" in bar) == complete, bar
    terminal.hang_up()
    run.ends(128 + signal.SIGHUP)
    assert run.saved()[-1] >= 10


def test_the_header_comes_before_the_emulators(start):
    run = start(QUICK, fault=(die, "workers", 1))
    run.dies()
    game, processes, directory, play = run.stdout.splitlines()
    assert game.startswith("ALE/MontezumaRevenge-v5 on cpu in fp32, fastops in ")
    assert processes.startswith("1 x 4 environments, ")
    assert directory == f"run {run.directory.relative_to(run.cwd)}"
    assert play == "1 rollouts of random play come first, to start the observation statistics"


@pytest.mark.parametrize(
    "capability, precision, warned", [("AVX2", "bf16", 1), ("AVX2", "auto", 0), ("AVX512", "bf16", 0)]
)
def test_bf16_on_a_processor_without_it_is_warned_of(capability, precision, warned, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    script.Run(script.Args(device="cpu", precision=precision, run_dir=str(tmp_path)), None, None).describe()
    assert capsys.readouterr().out.count("warning: without AVX-512") == warned


def test_half_of_the_threads_rest_during_a_rollout(tmp_path):
    """The workers need the cores as well. One thread alone never rests."""
    before = torch.get_num_threads()
    try:
        for threads, during in ((1, 1), (2, 1), (5, 3)):
            torch.set_num_threads(threads)
            run = script.Run(script.Args(run_dir=str(tmp_path)), None, None)
            for phase, expected in (("rollout", during), ("update", threads)):
                run.phase(phase)
                assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_what_has_no_value_yet_is_a_dash_and_the_room_one_is_in_counts(uninterrupted):
    """No episode has ended in the first rollout."""
    said = (uninterrupted.parents[1] / "run.stdout").read_text()
    assert "rollout 1, step 32: return - best - rooms 1 bonus " in said
    assert "rollout 2, step 64: return 0 best 0 rooms 1 bonus " in said


def test_the_end_says_what_next(base_run):
    """With the run's directory in a variable and the paths of script and tool, so that the lines can be pasted into a
    shell."""
    done, runs = base_run
    path = os.path.relpath(SCRIPT, runs.parent)  # the run was started in another directory than the script's
    [run] = runs.iterdir()
    *_, saved, variable, resume, play, curves, video = done.stdout.splitlines()
    assert saved == f"saved runs/{run.name}/checkpoint_000003.pt"
    assert shlex.split(variable) == [f"RUN=runs/{run.name}"]
    commands = [shlex.split(line, comments=True) for line in (resume, play, curves, video)]
    assert commands == [
        ["python", path, "--resume", "$RUN", "--total-rollouts", "6"],  # a finished run needs a new end
        ["python", path, "--play", "$RUN"],
        ["tensorboard", "--logdir", "$RUN"],
        ["python", path.replace(SCRIPT.name, "tools/watch.py"), "$RUN", "--video", "out.mp4"],
    ]


def test_the_end_names_the_tool_for_videos_where_there_is_one(tmp_path, monkeypatch, capsys):
    """Beside the script, or above as for examples/; a copy in another project has none."""
    run = script.Run(script.Args(), None, None)
    run.path, run.latest = Path("checkpoint_000001.pt"), {"format": 2}
    monkeypatch.chdir(tmp_path)
    for place, tool in ((".", "tools/watch.py"), ("examples", "tools/watch.py"), ("other", None)):
        monkeypatch.setattr(script, "script_path", lambda place=place: os.path.join(place, "my.py"))
        if tool:
            Path(tool).parent.mkdir(exist_ok=True)
            Path(tool).touch()
        elif Path("tools").exists():
            shutil.rmtree("tools")
        run.say_what_next()
        said = capsys.readouterr().out
        assert re.findall(r"python (\S*watch\.py)", said) == [tool] * bool(tool), said


def test_commands_name_the_script_on_another_drive_of_windows(monkeypatch):
    """From there no relative path leads to it."""

    def relpath(path):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    assert script.script_path() == script.__file__
