"""What a user installs: the package, its data files, its licence, and nothing else."""

import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from turnout._version import __version__

ROOT = Path(__file__).parents[2]
SRC = ROOT / "src"
MAX_BYTES = 5 * 2**20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_every_source_and_data_file_and_nothing_else(wheel):
    expected = {
        path.relative_to(SRC).as_posix()
        for path in (SRC / "turnout").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "turnout/py.typed" in expected
    with zipfile.ZipFile(wheel) as archive:
        names = {
            name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")
        }
    assert names == expected


def test_wheel_has_licence_entry_point_and_version(wheel):
    info = f"turnout-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert "turnout = turnout.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"


def test_base_installation_needs_no_hugging_face_library(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"turnout-{__version__}.dist-info/METADATA").decode()
    needs = message_from_string(text).get_all("Requires-Dist")
    base = {need.split(";")[0].split(">")[0].strip() for need in needs if "extra ==" not in need}
    assert base == {"torch", "triton", "typer", "rich"}


def test_wheel_is_small(wheel):
    assert wheel.stat().st_size < MAX_BYTES
