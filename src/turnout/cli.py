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
    types: Annotated[
        list[str] | None, typer.Argument(help="Architectures (model types); else a short list.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every architecture.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="Check a local Hugging Face checkpoint instead.")
    ] = None,
    support: Annotated[
        Path | None, typer.Option(help="With --all: write the table of docs/support.md here.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run, for example cuda.")] = "cpu",
    router: Annotated[
        str, typer.Option(help="fused: the whole models run with swapped routers.")
    ] = "model",
    json_file: Json = None,
) -> None:
    """Compare turnout with the model's own code: forward, gradients, LoRA, routing, bfloat16."""
    from turnout import verify as checks

    result = _run(
        lambda: checks.main(
            types,
            everything=everything,
            model=model,
            support=support,
            device=device,
            router=router,
        ),
        json_file,
    )
    if any(row["status"] == "fail" for row in result["rows"]):
        raise typer.Exit(1)


@app.command()
def train(
    model: Annotated[
        Path | None, typer.Option(help="A local Hugging Face checkpoint; without it a tiny one.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help='Text, or JSONL of {"text": ...} or {"messages": [...]}.')
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in --out.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; else one pass.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; else 2e-4.")] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha; else twice the rank.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence; else 1024.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences per step; else 1.")] = None,
    seed: Annotated[int, typer.Option(help="The seed of everything random.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    expert_dropout: Annotated[float, typer.Option(help="LoRA dropout on the experts.")] = 0.0,
    backend: Annotated[str, typer.Option(help="auto, torch, triton or hopper.")] = "auto",
    router: Annotated[str, typer.Option(help="model or fused.")] = "model",
    recompute: Annotated[str, typer.Option(help="none or gate_up.")] = "none",
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; else a quarter of the run.")
    ] = None,
    check: Annotated[
        bool | None, typer.Option(help="Reload the adapter without turnout and compare.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Fine-tune a causal language model with LoRA on its attention and experts."""
    flags = {name: value for name, value in locals().items() if name != "json_file"}
    from turnout.train import TrainConfig, TrainingFailed, run

    config = TrainConfig(**flags)
    try:
        _run(lambda: run(config), json_file)
    except TrainingFailed as error:
        Console(stderr=True).print(Text(f"error: {error}", style="bold red"), soft_wrap=True)
        raise typer.Exit(1) from None


@app.command()
def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Named shapes, repeated or joined by commas; else qwen3-30b."),
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help="fwd, full, lora16; else all.")] = None,
    provider: Annotated[
        list[str] | None, typer.Option(help="Who is timed; else all that are installed.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="T; else the shape's own.")] = None,
    routing: Annotated[
        list[str] | None, typer.Option(help="uniform, zipf1.2, half-empty; else uniform.")
    ] = None,
    recompute: Annotated[str, typer.Option(help="turnout's: none or gate_up.")] = "none",
    backend: Annotated[
        str, typer.Option(help="turnout's: auto, torch, triton or hopper.")
    ] = "auto",
    graph: Annotated[
        bool, typer.Option("--graph", help="Add rows for replays of a CUDA graph.")
    ] = False,
    repeats: Annotated[int, typer.Option(help="Timed calls, at least.")] = 20,
    step: Annotated[
        bool, typer.Option("--step", help="Whole training steps of real configurations instead.")
    ] = False,
    layers: Annotated[
        int | None, typer.Option(help="With --step: layers; else as many as fit the GPU.")
    ] = None,
    sequence: Annotated[
        int | None, typer.Option(help="With --step: tokens of a packed sequence; else 4096.")
    ] = None,
    vocabulary: Annotated[
        int | None, typer.Option(help="With --step: words; else cut with the layers.")
    ] = None,
    checkpointing: Annotated[
        list[str] | None, typer.Option(help="With --step: off, on; else both.")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="With --step: transformers' attn_implementation.")
    ] = None,
    rounds: Annotated[
        int, typer.Option(help="With --step: measure all again, the fastest of each counts.")
    ] = 1,
    plot: Annotated[Path | None, typer.Option(help="With --step: draw the rows here.")] = None,
    judge: Annotated[
        bool, typer.Option("--judge", help="With --step: run nothing, judge and draw --csv.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    csv: Annotated[Path | None, typer.Option(help="Append the rows to this CSV file.")] = None,
    commit: Annotated[
        str | None, typer.Option(help="For the CSV's first column; else turnout's version.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Speed and memory of turnout and its peers, each checked before it is timed."""
    flags = {name: value for name, value in locals().items() if name not in ("json_file", "step")}
    from turnout.bench.step_flags import chosen

    flags = chosen(flags, step=step)
    if step:
        from turnout.bench import step_command
        from turnout.bench.step_plan import StepConfig

        steps = StepConfig(**flags)
        failed = _run(lambda: step_command.main(steps), json_file)["failed"]
        raise typer.Exit(1 if failed else 0)
    from turnout.bench.command import BenchConfig, main

    config = BenchConfig(**flags)
    result = _run(lambda: main(config), json_file)
    if any(row["ms"] is None for row in result["rows"]):
        raise typer.Exit(1)


@app.command()
def tune(
    more: Annotated[
        list[Path] | None, typer.Argument(help="Further places for --from-reports.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="Named shapes, repeated or joined by commas.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="A local Hugging Face checkpoint.")] = None,
    recorded: Annotated[
        Path | None, typer.Option(help="The report of a run, or its folder: tune what ran there.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="T, repeated; else the shape's own, 4096 for --model.")
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help="lora, full; else lora.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="LoRA ranks, repeated; else 16.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    device: Annotated[
        str, typer.Option(help="auto, cuda, or cpu with TRITON_INTERPRET=1.")
    ] = "auto",
    backend: Annotated[
        str, typer.Option(help="auto: what runs in training here; triton: every product.")
    ] = "auto",
    minutes: Annotated[
        float | None, typer.Option(help="Stop then; the same command goes on later.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed calls of a finalist.")] = 30,
    record: Annotated[
        Path | None, typer.Option(help="The report to append to; else in the cache folder.")
    ] = None,
    from_reports: Annotated[
        list[Path] | None,
        typer.Option(help="Reports or files of a cache, or folders: prune the candidates."),
    ] = None,
    emit: Annotated[
        Path | None, typer.Option(help="With --from-reports: the table to write.")
    ] = None,
    onto: Annotated[
        Path | None, typer.Option(help="With --from-reports: the shipped table to start from.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Search the fastest config of every kernel, or prune the search from recorded reports."""
    if from_reports:
        from turnout.tune import from_reports as merge

        if shape or model or recorded:
            raise ValueError(
                "got --from-reports with --shape, --model or --recorded; expected one of them: "
                "reports are merged without a search"
            )

        _run(lambda: merge.main([*from_reports, *(more or [])], emit, onto), json_file)
        return
    if more or emit is not None or onto is not None:
        raise ValueError(
            "got places, --emit or --onto without --from-reports; expected them together. Name the "
            "reports, or leave these out to search"
        )
    flags = {
        name: value
        for name, value in locals().items()
        if name not in ("json_file", "more", "emit", "onto", "from_reports")
    }
    from turnout.tune.command import TuneConfig, main

    config = TuneConfig(**flags)
    if _run(lambda: main(config), json_file)["broken"]:
        raise typer.Exit(1)


@app.command()
def report(
    place: Annotated[Path, typer.Argument(help="A report, or the folder of a run.")],
    plot: Annotated[
        Path | None, typer.Option(help="Draw the roofline of the kernels here.")
    ] = None,
    json_file: Json = None,
) -> None:
    """What ran in a training run: kernels, keys, configs, timings, load of the experts."""
    from turnout.report.command import main

    _run(lambda: main(place, plot), json_file)


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
    """Runs `command` and writes its result to `json_file`, unless it is that of a process which
    only received what another one found.

    With `-` everything that is printed meanwhile goes to standard error, so that standard output is
    the JSON text and nothing else. A file that can not be written is an error before the work, not
    after it.
    """
    if json_file is None:
        return command()
    if json_file == "-":
        with redirect_stdout(sys.stderr):
            result = command()
        if "received" not in result:
            sys.stdout.write(_json_text(result))
        return result
    path = Path(json_file)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"--json is {json_file}; expected a file in a folder that exists. "
            f"Create {path.parent} first or name another file."
        )
    result = command()
    if "received" not in result:
        try:
            path.write_text(_json_text(result), encoding="utf-8")
        except OSError as error:
            raise ValueError(f"--json is {json_file}, which can not be written: {error}") from None
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
