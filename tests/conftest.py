"""Set before any test imports transformers: nothing in this suite may look at the network."""

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test reads or writes the configs that this user has tuned.
os.environ["TURNOUT_CACHE_DIR"] = str(Path(tempfile.gettempdir(), f"turnout-test-{os.getpid()}"))

# tests/gpu also runs where hypothesis is not installed.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # The same examples at every run: a failure found once is found again.
    settings.register_profile("turnout", deadline=None, derandomize=True, database=None)
    settings.load_profile("turnout")


@pytest.fixture(autouse=True)
def same_numbers_at_every_run() -> None:
    """What a test draws does not depend on the tests that ran before it in its worker."""
    torch.manual_seed(0)
