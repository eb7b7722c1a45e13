"""The output folder: what may be in it, what may be deleted, and files that are whole or not there.

OUT/run.json       the marker: written first, names the options of the run
OUT/base/          the built-in model after its base training (a plain checkpoint)
OUT/checkpoints/   the Trainer's checkpoints of the LoRA phase
OUT/adapter/       the adapter, plain PEFT
OUT/turnout-report.jsonl  which kernels ran, and the load of the experts (`turnout report OUT`)
OUT/loss.png  experts.png  report.json  summary.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turnout.tuning import journal

MARKER = "run.json"
_MADE_BY = "turnout train"
_KNOWN = {
    MARKER,
    "base",
    "checkpoints",
    "adapter",
    "loss.png",
    "experts.png",
    "report.json",
    journal.NAME,
    "summary.json",
}
# In every checkpoint beside the Trainer's files; written last, so it also says that all is there.
COUNTS = "expert_tokens.json"


def check_out(out: Path, *, overwrite: bool, resume: bool) -> None:
    """Raise `ValueError` unless a run may start in `out`. Changes nothing.

    A new run needs a folder that is empty or not there. `overwrite` admits an earlier run of
    `turnout train`, known by its run.json, with no file beside it that the run did not write.
    `resume` needs such a run.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ValueError(f"out is {out}, which is not a plain folder; expected a folder.")
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if resume:
        if MARKER not in names:
            raise ValueError(
                f"{out} holds no run of turnout train; expected one to resume. Leave out --resume "
                "to start anew."
            )
        read_marker(out)
    elif names and not overwrite:
        raise ValueError(
            f"{out} is not empty; expected a new or empty folder. Name another folder with --out, "
            "replace an earlier run with --overwrite, or go on with it with --resume."
        )
    elif names:
        _check_ours(out, names)


def check_outside(out: Path, name: str, path: Path | None) -> None:
    """Raise `ValueError` if the run reads `path` from the folder that it writes."""
    if path is not None and path.resolve().is_relative_to(out.resolve()):
        raise ValueError(
            f"{name} is {path}, which lies in the output folder {out}; expected another place. "
            "Copy it elsewhere, or name another folder with --out."
        )


def read_marker(out: Path) -> dict[str, Any]:
    """The content of run.json.

    Raises:
        ValueError: the file is not one that `turnout train` wrote.
    """
    try:
        marker = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        marker = None
    if not isinstance(marker, dict) or marker.get("made_by") != _MADE_BY:
        raise ValueError(
            f"{out / MARKER} is not the run.json of turnout train, so {out} is left as it is; "
            "expected an earlier run. Name another folder with --out."
        )
    return marker


def start(out: Path, marker: dict[str, Any]) -> None:
    """Empty `out` (checked by `check_out`) and write the marker first of all."""
    out.mkdir(parents=True, exist_ok=True)
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    write_json(out / MARKER, {"made_by": _MADE_BY, **marker})


def check_same_run(out: Path, marker: dict[str, Any]) -> None:
    """Raise `ValueError` naming the first option in which `marker` is not the run in `out`."""
    stored = read_marker(out)
    options = json.loads(json.dumps(marker))
    for name in sorted(options):
        if stored.get(name) != options[name]:
            raise ValueError(
                f"the run in {out} has {name} = {stored.get(name)!r}, not {options[name]!r}; "
                "expected the same options and data as before. Repeat them, or start anew in "
                "another folder."
            )


def last_checkpoint(out: Path) -> Path:
    """The newest complete checkpoint of the LoRA phase.

    Raises:
        ValueError: there is none.
    """
    found = []
    for path in (out / "checkpoints").glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and (path / COUNTS).is_file():
            found.append((int(step), path))
    if not found:
        raise ValueError(
            f"{out} has no checkpoint; expected one to resume from. The run stopped before its "
            "first: start anew with --overwrite, and with --save-steps for earlier checkpoints."
        )
    return max(found)[1]


def write_json(path: Path, value: object) -> None:
    """`value` as JSON: the file is complete or what it was before."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_file(path, lambda temporary: _write_text(temporary, text))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary file beside `path`, which then takes its place in one step."""
    temporary = _temporary(path)
    write(temporary)
    temporary.replace(path)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary folder beside `path`, which then takes its place."""
    temporary = _temporary(path)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    write(temporary)
    if path.exists():
        shutil.rmtree(path)
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    # Keeps the suffix, from which matplotlib tells the format.
    return path.with_name(f".tmp-{path.name}")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _check_ours(out: Path, names: set[str]) -> None:
    if MARKER not in names:
        raise ValueError(
            f"{out} is not an earlier run of turnout train (it has no {MARKER}), so --overwrite "
            "does not delete it. Name another folder with --out, or delete it yourself."
        )
    read_marker(out)
    foreign = sorted(name for name in names if name.removeprefix(".tmp-") not in _KNOWN)
    if foreign:
        raise ValueError(
            f"{out} holds {', '.join(foreign)}, which turnout train did not write, so --overwrite "
            "does not delete it. Move that elsewhere, or name another folder with --out."
        )
