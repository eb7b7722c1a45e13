"""Parity of turnout against the model's own code: `turnout verify`."""

from turnout.verify.run import (
    Row,
    main,
    support_page,
    table,
    to_dict,
    verify_checkpoint,
    verify_types,
)
from turnout.verify.tiny import TINY

__all__ = [
    "TINY",
    "Row",
    "main",
    "support_page",
    "table",
    "to_dict",
    "verify_checkpoint",
    "verify_types",
]
