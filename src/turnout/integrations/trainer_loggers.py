"""The loggers that `transformers.Trainer` was asked to report to, through their public interfaces.

Only what runs already is written to: no run is started, no login is made, nothing is installed. A
logger that fails costs one warning; training goes on.
"""

from __future__ import annotations

import gc
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger("turnout.trainer")

TABLE = "turnout/kernels"
Row = dict[str, str | int | float | None]


class Logger(Protocol):
    """One place to write to."""

    def table(self, rows: Sequence[Row], step: int) -> None:
        """All rows have the same columns."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Named numbers of one step."""


class TensorBoard:
    """The writer of the Trainer's own callback, or one in the run's folder."""

    def __init__(self, args: Any) -> None:
        self._writer = _trainers_writer() or _own_writer(args)

    def table(self, rows: Sequence[Row], step: int) -> None:
        """As markdown text."""
        lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
        for row in rows:
            cells = ("" if value is None else str(value) for value in row.values())
            lines.append("| " + " | ".join(cells) + " |")
        self._writer.add_text(TABLE, "\n".join(lines), step)
        self._writer.flush()

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def _trainers_writer() -> Any:
    """transformers (5.x) gives callbacks no way to each other: the open writer is looked for."""
    from transformers.integrations import TensorBoardCallback

    found = [one for one in gc.get_objects() if issubclass(type(one), TensorBoardCallback)]
    writers = [one.tb_writer for one in found if one.tb_writer is not None]
    return writers[-1] if writers else None


def _own_writer(args: Any) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(log_dir=str(Path(args.output_dir) / "runs" / "turnout"))


class WeightsAndBiases:
    """`wandb.log` into the run that is on (wandb 0.12 and later)."""

    def __init__(self, args: Any) -> None:
        self._wandb = _running("wandb", lambda module: module.run)

    def table(self, rows: Sequence[Row], step: int) -> None:
        table = self._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
        self._wandb.log({TABLE: table, "train/global_step": step})

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._wandb.log({**values, "train/global_step": step})


class Trackio:
    """`trackio.log`, which has the names of W&B; its tables take the names of columns from pandas
    alone, which it brings."""

    def __init__(self, args: Any) -> None:
        self._trackio = _running("trackio", lambda module: module)

    def table(self, rows: Sequence[Row], step: int) -> None:
        pandas = importlib.import_module("pandas")
        table = self._trackio.Table(dataframe=pandas.DataFrame(list(rows), dtype=object))
        self._trackio.log({TABLE: table, "train/global_step": step})

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._trackio.log({**values, "train/global_step": step})


class MlFlow:
    """An artifact of the active run, and its metrics (MLflow 2.3 and later)."""

    def __init__(self, args: Any) -> None:
        self._mlflow = _running("mlflow", lambda module: module.active_run())

    def table(self, rows: Sequence[Row], step: int) -> None:
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        self._mlflow.log_table(data=columns, artifact_file=f"{TABLE}.json")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(values, step=step)


class NotRunning(RuntimeError):
    """The logger was asked for and has no run to write to."""


def _running(name: str, run: Any) -> Any:
    """The module, which the Trainer's own callback has imported and started."""
    module = importlib.import_module(name)
    if run(module) is None:
        raise NotRunning(f"{name} has no active run")
    return module


LOGGERS: dict[str, Any] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
    "mlflow": MlFlow,
}


class Loggers:
    """All loggers of `args.report_to` that are known here; one that fails is dropped."""

    def __init__(self, args: Any) -> None:
        self._loggers: dict[str, Logger] = {}
        for name in args.report_to or []:
            if name == "none":
                continue
            if name not in LOGGERS:
                log.info("report_to has %s, which gets no table of kernels", name)
                continue
            try:
                self._loggers[name] = LOGGERS[name](args)
            # a logger of any version may fail in any way, and training goes on
            except Exception as error:  # noqa: BLE001
                log.warning("%s gets no table of kernels: %s", name, error)

    def table(self, rows: Sequence[Row], step: int) -> None:
        """To all; nothing without rows."""
        if rows:
            self._each(lambda logger: logger.table(rows, step))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """To all; nothing without values."""
        if values:
            self._each(lambda logger: logger.scalars(values, step))

    def _each(self, write: Any) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                write(logger)
            # as above: a full disk, a network that is gone, an interface that changed
            except Exception as error:  # noqa: BLE001
                del self._loggers[name]
                log.warning("%s can not be written and is left alone now: %s", name, error)
