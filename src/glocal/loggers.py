"""Where figures go besides `metrics.jsonl`: TensorBoard, and MLflow for groups that keep a server of their own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import Logger
from lightning_fabric.loggers.tensorboard import TensorBoardLogger

from glocal.errors import GlocalError
from glocal.files import write_text


def make_logger(name: str, folder: Path) -> Logger:
    """The logger `name` (`tensorboard` or `mlflow`) of the run in `folder`.

    Raises:
        GlocalError: MLflow is asked for, and not installed or not reachable.
    """
    if name == "tensorboard":
        return TensorBoardLogger(root_dir=folder, name="tensorboard", version="")
    return MLflowLogger(folder)


class MLflowLogger(Logger):
    """Figures to the MLflow server that `MLFLOW_TRACKING_URI` names (MLflow's own default otherwise).

    Raises:
        GlocalError: from every method, when MLflow fails.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise GlocalError("log=[mlflow] needs MLflow: pip install mlflow-skinny.") from error
        known = folder / "mlflow_run"  # a run that continues writes into its first MLflow run
        with _explained():
            experiment = mlflow.set_experiment("glocal")
            self._client = mlflow.MlflowClient()
            if not known.exists():
                run = self._client.create_run(experiment.experiment_id, run_name="/".join(folder.parts[-3:]))
                write_text(known, run.info.run_id)
        self._run = known.read_text(encoding="utf-8")

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "mlflow"

    @property
    def version(self) -> str:
        """Identity of the MLflow run."""
        return self._run

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send figures of one iteration."""
        with _explained():
            for key, value in metrics.items():
                self._client.log_metric(self._run, key, float(value), step=step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Send settings."""
        with _explained():
            for key, value in dict(params).items():
                self._client.log_param(self._run, key, value)

    def finalize(self, status: str) -> None:
        """Mark the MLflow run as ended."""
        with _explained():
            self._client.set_terminated(self._run)


@contextmanager
def _explained() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise GlocalError(
            f"MLflow failed ({str(error).strip().splitlines()[0]}): set MLFLOW_TRACKING_URI to a server that answers, "
            "or leave mlflow out of log; a begun run continues either way."
        ) from error
