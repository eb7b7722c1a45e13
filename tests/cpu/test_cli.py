"""The command line from outside: what it prints where, and how it ends."""

import json
import subprocess
import sys

import pytest

from turnout import cli, doctor
from turnout._version import __version__

HELP_IS_LIGHT = """
import sys
from turnout import cli
sys.argv = ["turnout", "--help"]
try:
    cli.main()
except SystemExit as end:
    assert end.code == 0
assert not {"transformers", "peft", "accelerate", "matplotlib"} & set(sys.modules)
"""

# Python with what the `hf` and `train` extras bring neither importable nor installed.
BASE_ONLY = """
import importlib.metadata, sys

EXTRAS = ("transformers", "peft", "accelerate", "safetensors", "matplotlib")

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Blocked())
installed = importlib.metadata.version

def version(name):
    if name in EXTRAS:
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)

importlib.metadata.version = version
from turnout import cli
cli.main()
"""


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)


def turnout(monkeypatch, *arguments):
    """Runs the command in this process and returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["turnout", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_version(monkeypatch, capsys):
    assert turnout(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"turnout {__version__}\n"


def test_python_m_turnout():
    done = python("-m", "turnout", "--version")
    assert (done.returncode, done.stdout) == (0, f"turnout {__version__}\n")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(monkeypatch, capsys, flag):
    assert turnout(monkeypatch, flag) == 0
    text = capsys.readouterr().out
    for command in ("doctor", "train", "verify", "bench", "tune", "report", "adapter"):
        assert command in text


def test_help_imports_nothing_heavy():
    done = python("-c", HELP_IS_LIGHT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["doctor"],
        ["train"],
        ["verify"],
        ["bench"],
        ["tune"],
        ["report"],
        ["adapter", "check"],
        ["adapter", "convert"],
    ],
)
def test_every_command_has_help_and_json(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "120")
    assert turnout(monkeypatch, *command, "-h") == 0
    assert "--json" in capsys.readouterr().out


def test_doctor_prints_tables(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "160")
    assert turnout(monkeypatch, "doctor") == 0
    text = capsys.readouterr().out
    for word in ("torch", "transformers", "peft", "Back ends", "triton", "hopper", "sonic"):
        assert word in text


def test_doctor_json_on_stdout_is_json_and_nothing_else():
    done = python("-m", "turnout", "doctor", "--json", "-")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["turnout"] == __version__
    backends = {row["name"]: row for row in facts["backends"]}
    assert list(backends) == ["torch", "triton", "hopper", "sonic"]
    assert backends["torch"] == {"name": "torch", "usable": True, "reason": None}
    assert all(row["usable"] == (row["reason"] is None) for row in facts["backends"])


def test_doctor_json_to_a_file_prints_tables_too(monkeypatch, capsys, tmp_path):
    path = tmp_path / "doctor.json"
    assert turnout(monkeypatch, "doctor", "--json", path) == 0
    assert "Packages" in capsys.readouterr().out
    assert json.loads(path.read_text())["packages"][0]["name"] == "torch"


def test_doctor_works_with_the_base_installation_alone():
    done = python("-c", BASE_ONLY, "doctor", "--json", "-")
    assert done.returncode == 0, done.stderr
    packages = {row["name"]: row for row in json.loads(done.stdout)["packages"]}
    assert packages["torch"]["status"] == "ok"
    assert packages["transformers"]["status"] == packages["peft"]["status"] == "not installed"


@pytest.mark.parametrize("command", [["train"], ["adapter", "check", "."]])
def test_missing_extra_is_a_clear_error(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", BASE_ONLY, *command],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "is not installed" in done.stderr
    assert "pip install 'turnout[" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("installed", "status"),
    [
        ("5.16.0", "too old"),
        ("5.16.1", "ok"),
        ("5.17.0.dev0", "ok"),
        ("6.0", "ok"),
        (None, "not installed"),
    ],
)
def test_doctor_says_which_transformers_is_too_old(monkeypatch, installed, status):
    def version(name):
        if installed is None:
            raise doctor.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(doctor, "version", version)
    packages = {row["name"]: row for row in doctor.examine()["packages"]}
    assert packages["transformers"]["status"] == status


def test_back_end_that_refuses_says_why(monkeypatch, capsys):
    class Picky:
        NAME = "triton"

        @staticmethod
        def rejects(problem, device):
            return f"needs a GPU, this is {device.name}"

    monkeypatch.setattr(doctor.gemm, "BACKENDS", (Picky,))
    rows = {row["name"]: row for row in doctor.examine()["backends"]}
    assert rows["triton"]["usable"] is False
    assert rows["triton"]["reason"].startswith("needs a GPU")
    assert rows["torch"]["reason"] == "not in this version"


@pytest.mark.parametrize("bad", ["nowhere/x.json", "."])
def test_json_file_that_cannot_be_written_fails_before_the_work(monkeypatch, capsys, tmp_path, bad):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "examine", lambda: pytest.fail("the work has started"))
    assert turnout(monkeypatch, "doctor", "--json", bad) == 2
    assert "--json" in capsys.readouterr().err


def test_users_mistake_is_one_message_on_stderr_and_exit_code_2(monkeypatch, capsys):
    def fail():
        raise ValueError("seeds are [1, 2]; expected one number. Give --seed 1.")

    monkeypatch.setattr(doctor, "examine", fail)
    assert turnout(monkeypatch, "doctor") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: seeds are [1, 2]; expected one number. Give --seed 1.\n"


def test_unsupported_is_told_apart_from_a_bug(monkeypatch, capsys):
    from turnout.specs import Unsupported

    def unsupported():
        raise Unsupported("no kernel for this; use backend='torch'")

    def bug():
        raise NotImplementedError("not written")

    monkeypatch.setattr(doctor, "examine", unsupported)
    assert turnout(monkeypatch, "doctor") == 2
    assert "backend='torch'" in capsys.readouterr().err
    monkeypatch.setattr(doctor, "examine", bug)
    monkeypatch.setattr(sys, "argv", ["turnout", "doctor"])
    with pytest.raises(NotImplementedError, match="not written"):
        cli.main()


def test_unknown_flag_is_exit_code_2(monkeypatch, capsys):
    assert turnout(monkeypatch, "doctor", "--no-such-flag") == 2


def test_json_stays_json_when_the_work_prints_or_returns_nan(monkeypatch, capsys):
    def examine():
        print("working")
        return {"a": float("nan"), "b": [float("inf"), -float("inf")], "c": (1.5, None)}

    monkeypatch.setattr(doctor, "examine", examine)
    assert turnout(monkeypatch, "doctor", "--json", "-") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": "nan", "b": ["inf", "-inf"], "c": [1.5, None]}
    assert err == "working\n"
