"""The `turnout` command: parses flags, calls one function, prints what it returns.

Everything heavy is imported inside the commands, so `turnout --help` is fast and `turnout doctor`
works with the base installation alone.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from turnout._version import __version__

app = typer.Typer(
    name="turnout",
    help="Fine-tune mixture-of-experts models: one line in, nothing else changes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
adapter = typer.Typer(help="Check and convert expert LoRA adapters.", no_args_is_help=True)
app.add_typer(adapter, name="adapter")

# What the base installation lacks, and the extra that brings it.
EXTRAS = {
    "transformers": "hf",
    "peft": "hf",
    "accelerate": "hf",
    "safetensors": "hf",
    "packaging": "hf",
    "matplotlib": "train",
}

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is standard output."),
]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True)
    ] = False,
) -> None:
    if version:
        typer.echo(f"turnout {__version__}")
        raise typer.Exit()


@app.command()
def doctor(json_file: Json = None) -> None:
    """What is installed, what the GPU can do, which back ends are usable and why not."""
    from turnout import doctor

    result = _run(doctor.examine, json_file)
    if json_file != "-":
        doctor.show(result, Console())


@app.command()
def verify(
    model: Annotated[
        Path | None, typer.Option(help="A local checkpoint instead of the tiny models.")
    ] = None,
    all_architectures: Annotated[
        bool, typer.Option("--all", help="Every architecture; without it a short list.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Compare turnout with the model's own code: forward, gradients, LoRA, routing."""
    from turnout import verify

    result = _run(lambda: verify.main(model=model, all_architectures=all_architectures), json_file)
    if any(row["status"] == "fail" for row in result["rows"]):
        raise typer.Exit(1)


@app.command()
def train(
    model: Annotated[Path | None, typer.Option(help="A local Hugging Face checkpoint.")] = None,
    data: Annotated[Path | None, typer.Option(help="A text or JSONL file.")] = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option(help="Replace what is in --out.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    seed: Annotated[int, typer.Option(help="The seed of everything random.")] = 0,
    json_file: Json = None,
) -> None:
    """Fine-tune a causal language model with LoRA on its experts; without --model a tiny one."""
    from turnout import train

    flags = {"model": model, "data": data, "out": out, "overwrite": overwrite}
    _run(lambda: train.main(**flags, resume=resume, steps=steps, seed=seed), json_file)


Model = Annotated[
    Path | None,
    typer.Option(help="The base model's folder: names every parameter and compares shapes."),
]


@adapter.command()
def check(
    folder: Annotated[Path, typer.Argument(help="The folder of a PEFT adapter.")],
    model: Model = None,
    json_file: Json = None,
) -> None:
    """Say what an adapter holds: layout, parameters, ranks, tensors that are all zero."""
    from turnout.integrations import adapters

    def work() -> dict[str, Any]:
        report = adapters.check_adapter(folder, model)
        adapters.print_report(report)
        return report.to_dict()

    findings = _run(work, json_file)["findings"]
    if any(finding["severity"] == "error" for finding in findings):
        raise typer.Exit(1)


@adapter.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="The folder of a PEFT adapter, 0.19.0 or older.")],
    out: Annotated[Path, typer.Argument(help="The new folder to write.")],
    model: Model = None,
    json_file: Json = None,
) -> None:
    """Rewrite an adapter of an older PEFT to today's layout, into a new folder."""
    from turnout.integrations import adapters

    def work() -> dict[str, Any]:
        report = adapters.convert_adapter(folder, out, model)
        adapters.print_report(report)
        return report.to_dict()

    _run(work, json_file)


def main() -> None:
    """The entry point. What the user can put right is one red message and exit code 2."""
    try:
        app()
    except ValueError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = EXTRAS[error.name]
        _fail(
            f"{error.name} is not installed; this command needs it. pip install 'turnout[{extra}]'"
        )
    except NotImplementedError as error:
        from turnout.specs import Unsupported

        if not isinstance(error, Unsupported):
            raise
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(Text(f"error: {message}", style="bold red"), soft_wrap=True)
    sys.exit(2)


def _run(command: Callable[[], dict[str, Any]], json_file: str | None) -> dict[str, Any]:
    """Runs `command` and writes its result to `json_file`.

    With `-` everything that is printed meanwhile goes to standard error, so that standard output is
    the JSON text and nothing else. A file that can not be written is an error before the work, not
    after it.
    """
    if json_file is None:
        return command()
    if json_file == "-":
        with redirect_stdout(sys.stderr):
            result = command()
        sys.stdout.write(_json_text(result))
        return result
    path = Path(json_file)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"--json is {json_file}; expected a file in a folder that exists. "
            f"Create {path.parent} first or name another file."
        )
    result = command()
    path.write_text(_json_text(result), encoding="utf-8")
    return result


def _json_text(result: dict[str, Any]) -> str:
    return json.dumps(_plain(result), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become the strings `nan`, `inf` and `-inf`."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    return value
