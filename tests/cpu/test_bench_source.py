"""`backend` and `config_source` of a row are what ran in the step, its backward pass included."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from turnout.bench.providers import PROVIDERS, Provider
from turnout.bench.run import measure
from turnout.bench.truth import make_judge
from turnout.bench.work import Mode, make_weights, make_work
from turnout.launch import Launch
from turnout.shapes import TINY


class FakeKernel:
    """Computes nothing, in the place of a kernel in Triton's interpreter."""

    def __init__(self, module: str) -> None:
        self.__module__ = module

    def __getitem__(self, grid):
        return lambda *tensors, **constants: None


def launching(launches, in_threads):
    """turnout's place, taken by the definition and these launches: half of them in the backward.

    `in_threads` takes whether autograd might have run each backward in a thread of its own, as it
    does on a GPU.
    """

    def start(some):
        for launch in some:
            launch(torch.empty(1))

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            in_threads.append(torch._C._is_multithreading_enabled())
            start(launches[1::2])
            return grad

    def prepare(work, mode, options):
        right = PROVIDERS["eager"].prepare(work, mode, options)

        def step(leaves):
            start(launches[::2])
            return right(dataclasses.replace(leaves, x=Op.apply(leaves.x)))

        return step

    return Provider("turnout", get_args(Mode), lambda device: None, prepare)


def launch_of(module, source):
    chosen = SimpleNamespace(source=source, note=lambda: None) if source else None
    return Launch(FakeKernel(module), (1, 1, 1), (), {}, 4, chosen=chosen)


@pytest.mark.parametrize(
    ("launches", "backend", "source"),
    [
        ([("triton_kernels", "analytic"), ("triton_movement", "")], "triton", "analytic"),
        (
            [("hopper_kernels", "fixed"), ("triton_kernels", "shipped"), ("triton_kernels", "")],
            "hopper+triton",
            "fixed+shipped",
        ),
        (
            [("triton_kernels", "user cache"), ("triton_kernels", "tuned")],
            "triton",
            "tuned+user cache",
        ),
        ([], "torch", ""),
    ],
    ids=str,
)
def test_the_source_of_the_configs_is_guessed(launches, backend, source):
    work = make_work(TINY, make_weights(TINY, torch.device("cpu")))
    judge = make_judge(work, lora=False, gradients=True)
    in_threads = []
    ours = launching([launch_of(*each) for each in launches], in_threads)
    (measured,) = measure(ours, work, "full", judge, repeats=1)
    assert measured.reason is None
    assert (measured.backend, measured.config_source) == (backend, source)
    # The step that is listened to, then those that are timed.
    assert in_threads == [False] + [True] * (len(in_threads) - 1)
    assert len(in_threads) > 1
