"""`TurnoutCallback`: what ran, and the load of the experts, from a `transformers.Trainer`.

    trainer = Trainer(..., callbacks=[TurnoutCallback()])

After the first step the record of `turnout.tuning.report` goes once into a local JSON lines file,
to the Trainer's own loggers (`report_to`) and to a function of yours. Where nothing ran yet, the
next steps are asked, up to the fifth; then never again. At every logging step, or at some of them,
the load of the experts follows. The first process writes; there is no network code here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from turnout.integrations.expert_load import ExpertLoad
from turnout.integrations.trainer_loggers import Loggers, Row
from turnout.tuning import journal, report
from turnout.tuning.show import short

LAST_STEP = 5  # of this process: after it nobody asks whether a kernel ran
log = logging.getLogger("turnout.trainer")

Lines = list[dict[str, Any]]


class TurnoutCallback(TrainerCallback):
    """Reports kernels once and expert load at logging steps; see the module's docstring.

    Args:
        path: the file to append to; None is `turnout-report.jsonl` in the Trainer's output folder,
            False writes no file.
        send: called with the same lines that go into the file.
        loggers: write to `report_to` as well.
        expert_load: count tokens per expert at the routers.
        load_steps: the load goes out at logging steps that are a multiple of this, and at the last;
            tokens of the steps between are in it.
    """

    def __init__(
        self,
        path: Path | str | bool | None = None,
        *,
        send: Callable[[Lines], object] | None = None,
        loggers: bool = True,
        expert_load: bool = True,
        load_steps: int = 1,
    ) -> None:
        if path is True:
            raise ValueError("path is True; expected a file, None for the usual one, or False")
        if load_steps < 1:
            raise ValueError(f"load_steps is {load_steps}; expected an integer of at least 1")
        self._path, self._load_steps = path, load_steps
        self._send, self._use_loggers, self._count = send, loggers, expert_load
        self._loggers: Loggers | None = None
        self._load: ExpertLoad | None = None
        self._steps = 0
        self.has_reported = False
        self._has_head = self._file_failed = False

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Hooks on the routers; after an earlier training, on those of the new one."""
        self.on_train_end(args, state, control)
        if self._count and state.is_world_process_zero and model is not None:
            self._load = ExpertLoad(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The record, once."""
        if self.has_reported:
            return
        self._steps += 1
        if not state.is_world_process_zero:
            self.has_reported = True
            return
        lines = report.record()
        if len(lines) > 1:
            self.has_reported = True  # before anything can fail
            self._write(args, lines)
            rows = [_row(line) for line in lines if line["event"] == "kernel"]
            self._of(args).table(rows, state.global_step)
        elif self._steps >= LAST_STEP:
            self.has_reported = True
            log.info("no kernel with a config ran in %d steps; nothing to report", self._steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The load of the experts, with the training loss and not with evaluations."""
        if self._load is None or "loss" not in (logs or {}):
            return
        step = state.global_step
        if step % self._load_steps and step != state.max_steps:
            return
        layers = self._load.take()
        if not layers:
            return
        self._write(args, [{"event": "experts", "step": step, "layers": layers}])
        self._of(args).scalars(_scalars(layers), step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The hooks are gone, so that the model is as it was."""
        if self._load is not None:
            self._load.detach()
            self._load = None

    def _of(self, args: Any) -> Loggers:
        if self._loggers is None:
            names = args if self._use_loggers else _Silent()
            self._loggers = Loggers(names)
        return self._loggers

    def _write(self, args: Any, lines: Lines) -> None:
        if self._path is not False and not self._file_failed:
            path = Path(args.output_dir) / journal.NAME if self._path is None else Path(self._path)
            if lines[0]["event"] != "head" and not (self._has_head and path.exists()):
                lines = [report.record()[0], *lines]
            self._has_head = True
            try:
                journal.append(path, lines)
            except OSError as error:
                self._file_failed = True
                log.warning("%s can not be written (%s); training goes on without it", path, error)
        if self._send is not None:
            try:
                self._send(lines)
            # the user's function may fail in any way, and training goes on
            except Exception as error:  # noqa: BLE001
                self._send = None
                log.warning("send failed and is not called again: %r", error)


class _Silent:
    """Arguments that report to nobody."""

    report_to: tuple[str, ...] = ()


def _row(line: dict[str, Any]) -> Row:
    """A kernel event as a flat row."""
    key, search = line["key"], line["search"] or {}
    return {
        "kernel": line["kernel"],
        **{name: key[name] for name in ("rows", "n", "k", "experts", "rank", "dtype")},
        "epilogue": key["epilogue"],
        "layout": " ".join(key["layout"]),
        "config": short(line["config"]),
        "source": line["source"],
        "device": line["device"],
        "ms": None if "winner_s" not in search else 1e3 * search["winner_s"],
    }


def _scalars(layers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Per layer: tokens of the busiest expert over the mean, share of idle experts, dropped."""
    found: dict[str, float] = {}
    for name, layer in layers.items():
        load = layer["load"]
        mean = sum(load) / len(load)
        place = f"experts/{name}"
        found[f"{place}/busiest_over_mean"] = max(load) / mean if mean else 0.0
        found[f"{place}/idle"] = sum(count == 0 for count in load) / len(load)
        found[f"{place}/dropped"] = layer["dropped"]
        if layer["entropy"] is not None:
            found[f"{place}/entropy"] = layer["entropy"]
    return found
