"""turnout as a layer of the `kernels` package on the GPU: gpt-oss, no hub.

Skipped, and so not run, where the installed transformers does not accept the installed `kernels`.
"""

from __future__ import annotations

from typing import Any

import pytest
from cuda_cases import DEVICE
from transformers.utils.import_utils import (
    KERNELS_MAX_VERSION,
    KERNELS_MIN_VERSION,
    is_kernels_available,
)

import turnout
from turnout.integrations.kernels import TurnoutMoeMLP, mapping
from turnout.verify import checks, tiny
from turnout.verify.run import FORWARD, GRADIENT

if not is_kernels_available():
    pytest.skip(
        f"no kernels >= {KERNELS_MIN_VERSION}, < {KERNELS_MAX_VERSION}, which this transformers "
        "accepts: the kernel layer was not tested",
        allow_module_level=True,
    )

from kernels import Mode, kernelize, use_kernel_mapping

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def gpt_oss(adapters: str) -> Any:
    """The tiny model on the device, with adapters."""
    model = tiny.build("gpt_oss").to(DEVICE)
    targets = turnout.lora_targets(model) if "experts" in adapters else []
    if "router" in adapters:
        targets = [*targets, "mlp.router.weight"]
    return checks.with_adapters(model, targets) if targets else model


@pytest.mark.parametrize("adapters", ["none", "experts", "router", "experts and router"])
def test_a_kernelized_block_is_another_block(adapters: str) -> None:
    model = gpt_oss(adapters)
    inputs = {name: value.to(DEVICE) for name, value in tiny.make_inputs("gpt_oss").items()}
    theirs = checks.run(model, inputs)
    nudged = checks.run(model, inputs, nudge=2.0**-23)
    blocks = [m for m in model.modules() if type(m).__name__ == "GptOssMLP"]
    with use_kernel_mapping(mapping(), inherit_mapping=False):
        for block in blocks:
            kernelize(block, mode=Mode.TRAINING, device=DEVICE.type, use_fallback=False)
    bound = [vars(block)["forward"].__func__ for block in blocks]
    assert bound == [TurnoutMoeMLP.forward] * len(blocks) != []
    ours = checks.run(model, inputs)
    assert checks.output_error(ours, theirs) <= FORWARD
    assert checks.gradient_error(ours, theirs, nudged) <= GRADIENT
