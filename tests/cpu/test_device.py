"""Facts about devices, on a machine that may have no GPU."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from turnout import device, doctor
from turnout.device import Device, device_of

H100 = Device(
    name="NVIDIA H100 80GB HBM3",
    arch=90,
    num_sms=132,
    shared_memory=232448,
    memory_bytes=85_000_000_000,
    l2_bytes=52_428_800,
)


@pytest.fixture
def two_gpus(monkeypatch):
    """torch as it answers on a machine with two GPUs, the second one current."""
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"]

    def properties(index):
        return SimpleNamespace(
            name=names[index],
            major=9 - index,
            minor=0,
            multi_processor_count=132,
            shared_memory_per_block_optin=232448,
            total_memory=85_000_000_000,
            L2_cache_size=52_428_800,
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    device._gpu.cache_clear()
    yield
    device._gpu.cache_clear()


def test_cpu_has_no_arch():
    assert device_of(torch.device("cpu")) == Device(
        name="cpu", arch=None, num_sms=0, shared_memory=0, memory_bytes=0, l2_bytes=0
    )


def test_gpu_without_a_driver_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="sees no GPU"):
        device_of(torch.device("cuda"))


@pytest.mark.usefixtures("two_gpus")
def test_cuda_without_an_index_is_the_current_gpu():
    assert device_of(torch.device("cuda:0")) == H100
    assert device_of(torch.device("cuda")).arch == 80
    assert len(device.visible_gpus()) == 2


@pytest.mark.usefixtures("two_gpus")
def test_index_that_is_not_there_is_a_clear_error():
    with pytest.raises(ValueError, match="index below 2"):
        device_of(torch.device("cuda:2"))


@pytest.mark.usefixtures("two_gpus")
def test_arch_of_another_maker_is_not_taken_for_nvidias(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert device_of(torch.device("cuda:0")).arch is None


def test_import_does_not_start_cuda():
    code = "import turnout.device, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [
        (75, []),
        (80, ["bf16 tensor cores"]),
        (89, ["bf16 tensor cores", "fp8 tensor cores"]),
        (90, ["bf16 tensor cores", "fp8 tensor cores", "TMA", "wgmma"]),
        (100, ["bf16 tensor cores", "fp8 tensor cores", "TMA", "tcgen05"]),
        (120, ["bf16 tensor cores", "fp8 tensor cores", "TMA"]),
    ],
)
def test_features_follow_the_generation(arch, expected):
    gpu = Device(name="x", arch=arch, num_sms=1, shared_memory=0, memory_bytes=0, l2_bytes=0)
    assert doctor.features(gpu) == expected


@pytest.mark.usefixtures("two_gpus")
def test_doctor_lists_every_gpu(capsys):
    from rich.console import Console

    facts = doctor.examine()
    assert [gpu["arch"] for gpu in facts["gpus"]] == [90, 80]
    assert facts["why_no_gpu"] is None
    doctor.show(facts, Console(width=200))
    text = capsys.readouterr().out
    assert "sm_90" in text
    assert "227 KiB" in text
