"""Set before any test imports transformers: nothing in this suite may look at the network."""

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# tests/gpu also runs where hypothesis is not installed.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    # The same examples at every run: a failure found once is found again.
    settings.register_profile("turnout", deadline=None, derandomize=True, database=None)
    settings.load_profile("turnout")
