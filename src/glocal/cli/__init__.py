"""The command line: one small file per command, no logic, heavy imports only inside the commands."""

import os
import signal
import sys
import threading
from typing import Annotated, NoReturn

import typer

from glocal import __version__
from glocal.cli.check import check
from glocal.cli.collect import collect
from glocal.cli.demo import demo
from glocal.cli.evaluate import evaluate
from glocal.cli.experiment import experiment
from glocal.cli.finetune import finetune
from glocal.cli.methods import methods
from glocal.cli.phantom import phantom
from glocal.cli.predict import predict
from glocal.cli.preprocess import preprocess
from glocal.cli.pretrain import pretrain
from glocal.cli.recipes import recipes
from glocal.cli.report import report
from glocal.cli.run import run

app = typer.Typer(
    name="glocal",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_STOPPED = 130
START, DATA, STEPS, RESEARCH = "Start here", "Your data", "Step by step", "Research"
for command, panel in (
    (demo, START),
    (run, START),
    (recipes, START),
    (methods, START),
    (phantom, DATA),
    (collect, DATA),
    (check, DATA),
    (preprocess, STEPS),
    (pretrain, STEPS),
    (finetune, STEPS),
    (predict, STEPS),
    (evaluate, STEPS),
    (report, STEPS),
    (experiment, RESEARCH),
):
    app.command(rich_help_panel=panel)(command)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"glocal {__version__}")
        raise typer.Exit


@app.callback()
def _before_any_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Segment medical volumes from a handful of labels."""


def main() -> None:
    """Run the command line; a problem the user can solve is one sentence and exit code 2, Ctrl-C is 130."""
    from glocal.errors import GlocalError
    from glocal.files import explained

    _say_it_once()
    if "RANK" not in os.environ:  # torchrun ends its processes in its own way
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster whose time is up: as Ctrl-C
    try:
        app()
    except GlocalError as error:
        _refuse(str(error))
    except Exception as error:
        if sentence := explained(error):
            _refuse(sentence)
        raise
    except SystemExit as end:
        if end.code == _STOPPED:  # what Typer makes of Ctrl-C
            typer.secho("Stopped. Start the same command again and it continues.", err=True)
            _leave(_STOPPED)
        raise


def _say_it_once() -> None:
    """Of several processes (torchrun, srun) only the first speaks; what goes wrong is said by all."""
    if int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) > 0:
        from glocal.progress import console

        console.quiet = True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _refuse(sentence: str) -> NoReturn:
    typer.secho(f"Error: {sentence}", fg=typer.colors.RED, err=True)
    _leave(2)


def _leave(code: int) -> NoReturn:
    """End now: a thread that is at work on a volume may need minutes yet, and what it has not finished is not there."""
    preprocessing = sys.modules.get("glocal.data.preprocess")
    workers = [t for t in threading.enumerate() if preprocessing and t.name.startswith(preprocessing.WORKER)]
    for worker in workers:
        worker.join(timeout=1)
    if any(worker.is_alive() for worker in workers):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
