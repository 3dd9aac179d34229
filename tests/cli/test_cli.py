"""The command line: what it lists, that it starts fast, and that a user's mistake is one sentence and exit code 2."""

import errno
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

import glocal
from glocal.cli import app, main
from glocal.experiments import recipe as recipe_module
from glocal.experiments.recipe import recipe_names, recipe_text
from glocal.finetuning.registry import STRATEGIES
from glocal.networks.registry import NETWORKS
from glocal.pretraining.registry import METHODS

HEAVY = ("torch", "numpy", "pandas", "SimpleITK", "monai", "matplotlib", "scipy", "lightning_fabric", "pydantic")


class Shell:
    """Runs `glocal WORDS` in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd
        monkeypatch.setenv("COLUMNS", "100")

    def __call__(self, *words: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self.monkeypatch.setattr(sys, "argv", ["glocal", *words])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = self.capfd.readouterr()
        return int(end.value.code or 0), out, err


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capfd)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_help_lists_every_command(shell: Shell) -> None:
    code, out, _ = shell("--help")
    assert code == 0
    commands = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert sorted(commands) == sorted(glocal.__all__)
    shown = {line.strip("│ ").split(" ")[0] for line in out.splitlines()}
    assert set(commands) <= shown


@pytest.mark.parametrize("command", sorted(glocal.__all__))
def test_every_command_explains_itself(shell: Shell, command: str) -> None:
    code, out, err = shell(command, "--help")
    assert (code, err) == (0, "")
    assert f"glocal {command}" in out


def test_version(shell: Shell) -> None:
    assert shell("--version")[:2] == (0, f"glocal {glocal.__version__}\n")


def test_help_of_run_names_its_arguments(shell: Shell) -> None:
    out = shell("run", "--help")[1]
    assert all(word in out for word in ("recipe", " [KEY=VALUE]... ", "--workers", "data=DATASET out=RUN"))


def test_the_command_line_starts_without_anything_heavy() -> None:
    loaded = python("import sys, glocal.cli; print(*sys.modules)").split()
    assert "typer" in loaded
    assert not set(HEAVY) & set(loaded)


def test_a_mistake_is_one_line_and_exit_code_2_as_a_module_too() -> None:
    command = [sys.executable, "-m", "glocal", "recipes", "acdc_small"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "Error: There is no recipe 'acdc_small' and no such YAML file: did you mean 'acdc-small'?"
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "phantm"], "There is no recipe 'phantm' and no such YAML file: did you mean 'phantom'?"),
        (["run", "auto"], "Say which data and where to: data=DATASET out=RUN."),
        (["run", "acdc-small", "out"], "'out' is not understood: settings are written key=value, for example seed=1."),
        (["run", "acdc-small", "data=x", "out=y", "sede=1"], "sede is not a setting: did you mean 'seed'?"),
        (
            ["run", "acdc-small", "data=x", "out=y", "finetune.labels=abc"],
            "finetune.labels=abc does not fit: it must be a whole number or 'all' or a list in brackets.",
        ),
        (
            ["pretrain", "STORE", "RUN", "--method", "pcll"],
            "There is no pre-training method 'pcll': did you mean 'pcl'?",
        ),
        (["predict", "absent", "IMAGES", "OUT"], "absent does not exist: give a model.safetensors file or "),
        (["report", "absent"], "absent holds no run of glocal (no readable recipe.yaml): choose another folder."),
        (["finetune", "STORE", "RUN", "--labels", "0"], "--labels '0' is neither a number of volumes from 1 on nor "),
        (["preprocess", "absent", "STORE"], "absent has no dataset.json: make a dataset of your images with "),
    ],
)
def test_mistakes_are_said_in_one_line(shell: Shell, tmp_path: Path, words: list[str], sentence: str) -> None:
    shell.monkeypatch.chdir(tmp_path)
    code, out, err = shell(*words)
    assert code == 2
    assert err.startswith(f"Error: {sentence}")
    assert err.count("\n") == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_suggests_the_right_one(shell: Shell) -> None:
    code, _, err = shell("pretrai")
    assert code == 2
    assert "Did you mean 'pretrain'?" in err


def raising(error: BaseException) -> object:
    def fail(*_: object) -> NoReturn:
        raise error

    return fail


def test_ctrl_c_says_that_the_work_can_be_continued(shell: Shell) -> None:
    shell.monkeypatch.setattr(recipe_module, "recipe_names", raising(KeyboardInterrupt()))
    code, _, err = shell("recipes")
    assert code == 130
    assert err == "Stopped. Start the same command again and it continues.\n"


def test_a_full_disk_is_a_sentence_wherever_it_happens(shell: Shell) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/scratch/metrics.jsonl")
    shell.monkeypatch.setattr(recipe_module, "recipe_names", raising(full))
    code, _, err = shell("recipes")
    assert code == 2
    assert err.startswith("Error: No space left on disk while writing /scratch/metrics.jsonl: free some space")


def test_a_lack_of_memory_is_a_sentence_too(shell: Shell) -> None:
    shell.monkeypatch.setattr(recipe_module, "recipe_names", raising(MemoryError()))
    code, _, err = shell("recipes")
    assert code == 2
    assert "let fewer happen at the same time (--workers)" in err


@pytest.mark.parametrize("error", [ValueError("our own mistake"), OSError(errno.EIO, "broken")])
def test_our_own_mistakes_keep_their_traceback(shell: Shell, error: Exception) -> None:
    shell.monkeypatch.setattr(recipe_module, "recipe_names", raising(error))
    shell.monkeypatch.setattr(sys, "argv", ["glocal", "recipes"])
    with pytest.raises(type(error), match=str(error.args[-1])):
        main()


def test_recipes_are_listed_shown_and_filled_in(shell: Shell, raw: Path) -> None:
    lines = shell("recipes")[1].splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split()) > 3 for line in lines)
    assert shell("recipes", "auto")[1] == recipe_text("auto")
    filled = shell("recipes", "auto", "--data", str(raw))[1]
    assert "auto: true" not in filled
    assert f"data: {raw}" in filled
    assert "slice_axis: z" in filled


def test_methods_are_listed_with_their_papers(shell: Shell) -> None:
    out = shell("methods")[1]
    for registry in (METHODS, STRATEGIES, NETWORKS):
        for name, entry in registry.items():
            assert f"  {name} " in out
            assert entry.summary in out
            assert entry.paper in out


SLOW = """
import signal, sys, time
from glocal.data import preprocess
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a script
def endless(*given, **named):
    print("begun", flush=True)
    time.sleep(300)
preprocess._prepare_case = endless
from glocal.cli import main
sys.argv = ["glocal", "preprocess", *sys.argv[1:], "--workers", "2"]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])  # SIGTERM is what a cluster says when time is up
def test_ctrl_c_waits_for_no_volume(raw: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Nor does it leave anything half-written: what is being worked on is not there."""
    command = [sys.executable, "-c", SLOW, str(raw), str(tmp_path / "store")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    try:
        while process.poll() is None:
            process.send_signal(number)  # again if need be: Python loses one that comes while it collects garbage
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)  # of the 300 seconds that each volume would take
        _, said = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Start the same command again" in said
    assert not (tmp_path / "store" / "index.json").exists()
