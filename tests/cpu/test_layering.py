"""Imports point one way, and the source keeps the house rules that a parser can see.

`problems` reads every file of a package with `ast` (so imports inside functions count) and returns
one sentence per violation.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src" / "turnout"

# docs/design.md. A module imports from lower layers and from its own folder. The package root (the
# public names, loaded on first use) stands between the integrations and the programs.
LAYERS = {
    "_version": 0,
    "kernel_facts": 0,
    "specs": 0,
    "shapes": 0,
    "device": 1,
    "measure": 2,
    "library": 2,
    "shortcuts": 2,
    "launch": 2,
    "testing": 2,
    "ragged": 3,
    "replay": 3,
    "compile_ahead": 3,
    "compile_worker": 2,
    "quant": 3,
    "tuning": 4,
    "routing": 5,
    "experts": 6,
    "parallel": 6,
    "reference": 7,
    "integrations": 7,
    "__init__": 7.5,
    "train": 8,
    "verify": 8,
    "bench": 8,
    "doctor": 8,
    "tune": 8,
    "report": 8,
    "cli": 9,
    "__main__": 10,
}
# Who may know the Hugging Face libraries: the integrations, and programs that run whole models.
KNOWS_HUGGING_FACE = {"integrations", "train", "verify", "bench"}
HUGGING_FACE = {"transformers", "peft", "accelerate", "datasets", "trl", "safetensors"}
NETWORK = {
    "socket", "ssl", "urllib", "urllib3", "requests", "http", "httpx", "aiohttp", "ftplib",
    "smtplib", "xmlrpc", "huggingface_hub",
}  # fmt: skip
ENVIRONMENT_VARIABLE = "TURNOUT_CACHE_DIR"
MAX_LINES = 600


def problems(package: Path, layers: dict[str, float] = LAYERS) -> list[str]:
    """Every violation in `package`, one sentence each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        unit = _unit(path, package)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if unit not in layers:
            found.append(f"{name}: {unit} has no layer")
            continue
        for target, line in _imports(tree, path, package):
            found += [f"{name}:{line}: {text}" for text in _judge_import(unit, target, layers)]
        for text, line in _judge_code(tree, in_integrations=unit == "integrations"):
            found.append(f"{name}:{line}: {text}")
    return found


def _unit(path: Path, package: Path) -> str:
    """The folder or module of the package that `path` belongs to."""
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py")


def _imports(tree: ast.AST, path: Path, package: Path) -> Iterator[tuple[str, int]]:
    """Full dotted names of everything imported, and the line. `from a import b` gives `a.b`."""
    parents = [package.name, *path.relative_to(package).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{start}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and _dotted(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value, node.lineno


def _judge_import(unit: str, target: str, layers: dict[str, float]) -> Iterator[str]:
    parts = target.split(".")
    if parts[0] in NETWORK:
        yield f"imports {target}: turnout has no network code"
    if parts[0] in HUGGING_FACE and unit not in KNOWS_HUGGING_FACE:
        yield f"imports {target}: only {', '.join(sorted(KNOWS_HUGGING_FACE))} may"
    if parts[0] != "turnout":
        return
    # `from turnout import x`: a module of the package, or a public name of its root
    other = parts[1] if len(parts) > 1 and parts[1] in layers else "__init__"
    if other != unit and layers[other] >= layers[unit]:
        yield f"{unit} (layer {layers[unit]}) imports {target} (layer {layers[other]})"


def _judge_code(tree: ast.AST, *, in_integrations: bool) -> Iterator[tuple[str, int]]:
    allowed = set()  # nodes that name the one environment variable
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and _is_our_variable(node.args[0]):
            allowed.update(id(part) for part in ast.walk(node.func))
        if isinstance(node, ast.Subscript) and _is_our_variable(node.slice):
            allowed.update(id(part) for part in ast.walk(node.value))
    for node in ast.walk(tree):
        name = _dotted(node)
        if name in ("os.environ", "os.getenv", "os.putenv") and id(node) not in allowed:
            yield f"{name}: the one environment variable is {ENVIRONMENT_VARIABLE}", node.lineno
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in ("environ", "getenv", "putenv"):
                    yield f"from os import {alias.name}: write os.{alias.name}", node.lineno
        if name.endswith(".autotune") or _imports_autotuner(node):
            yield "uses Triton's autotuner: turnout.tuning chooses configs", node.lineno
        if in_integrations:
            continue
        if isinstance(node, ast.ExceptHandler) and _catches_everything(node.type):
            yield "catches every exception: name the ones you expect", node.lineno
        if isinstance(node, ast.Call) and _dotted(node.func) == "getattr" and len(node.args) == 3:
            yield "getattr with a default guesses: ask for the attribute", node.lineno


def _imports_autotuner(node: ast.AST) -> bool:
    names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
    return not names.isdisjoint({"autotune", "Autotuner"})


def _is_our_variable(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == ENVIRONMENT_VARIABLE


def _catches_everything(kind: ast.expr | None) -> bool:
    if kind is None:
        return True
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(_dotted(one).split(".")[-1] in ("Exception", "BaseException") for one in kinds)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return ""


def _write(package: Path, files: dict[str, str]) -> Path:
    for name, text in {"__init__.py": "", **files}.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_package_keeps_its_layers_and_rules():
    assert problems(SRC) == []


@pytest.mark.parametrize("folder", ["src", "tests"])
def test_no_file_is_longer_than_the_limit(folder):
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"{long}: {MAX_LINES} lines is the limit; split the file"


@pytest.mark.parametrize(
    "statement",
    [
        "from turnout.integrations.peft import attach",
        "from turnout.integrations import peft",
        "from turnout import integrations",
        "import turnout.integrations.peft",
        "from ..integrations import peft",
        "from .. import integrations",
        "import importlib; importlib.import_module('turnout.integrations.peft')",
        "from turnout import patch",
        "import turnout",
        "from turnout.parallel import plan",  # same layer, other folder
        "import transformers",
        "from peft.tuners import lora",
    ],
)
def test_upward_import_inside_a_function_is_found(tmp_path, statement):
    body = f"def f():\n    {statement}\n"
    package = _write(tmp_path / "turnout", {"experts/ops.py": body})
    (problem,) = problems(package)
    assert problem.startswith("experts/ops.py:2: ")


@pytest.mark.parametrize(
    "body",
    [
        "import requests",
        "import urllib.request",
        "from huggingface_hub import snapshot_download",
        "import os\nos.environ['TURNOUT_DEBUG']",
        "import os\nos.environ.get('HOME')",
        "import os\nos.getenv('HOME')",
        "import os\nos.environ.update(A='TURNOUT_CACHE_DIR')",
        "from os import environ",
        "try:\n    pass\nexcept Exception:\n    raise",
        "try:\n    pass\nexcept:\n    raise",
        "try:\n    pass\nexcept (ValueError, BaseException):\n    raise",
        "getattr(1, 'x', None)",
        "import triton\n@triton.autotune(configs=[], key=[])\n@triton.jit\ndef f():\n    pass",
        "import triton\nf = triton.runtime.autotuner.autotune([], [])(print)",
        "from triton import autotune",
        "from triton.runtime.autotuner import Autotuner",
    ],
)
def test_broken_rule_is_found(tmp_path, body):
    assert len(problems(_write(tmp_path / "turnout", {"ragged.py": body}))) == 1


def test_module_without_a_layer_is_found(tmp_path):
    package = _write(tmp_path / "turnout", {"helpers.py": "", "misc/stuff.py": ""})
    assert problems(package) == [
        "helpers.py: helpers has no layer",
        "misc/stuff.py: misc has no layer",
    ]


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("experts/ops.py", "from turnout.routing import ops\nfrom .reference import expert_mlp\n"),
        ("experts/ops.py", "from turnout import specs\nfrom ..ragged import sort_by_expert\n"),
        ("train.py", "import transformers\nfrom turnout import patch\n"),
        (
            "integrations/peft.py",
            "try:\n    x = getattr(1, 'x', 0)\nexcept Exception:\n    raise\n",
        ),
        ("tuning/cache.py", "import os\nos.environ.get('TURNOUT_CACHE_DIR')\n"),
        ("tuning/cache.py", "import os\nos.environ['TURNOUT_CACHE_DIR']\n"),
        ("tuning/cache.py", "import os\nos.getenv('TURNOUT_CACHE_DIR')\n"),
    ],
)
def test_what_is_allowed_is_not_reported(tmp_path, name, body):
    assert problems(_write(tmp_path / "turnout", {name: body})) == []
