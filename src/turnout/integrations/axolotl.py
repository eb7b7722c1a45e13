"""`TurnoutPlugin`: turnout in an axolotl config. Needs axolotl 0.19 or newer; see docs/axolotl.md.

    plugins:
      - turnout.integrations.axolotl.TurnoutPlugin
    turnout_backend: auto

What happens when, in axolotl's order:

    register         versions of axolotl, transformers and PEFT
    validation       `TurnoutArgs` joins the schema; conflicts are refused
    pre_model_load   conflicts again, as other plugins write keys; the back end can run here
    post_lora_load   `turnout.patch`, with full fine-tuning and with adapters alike
    post_model_load  nobody took a fused layer away; the summary goes to the log
    trainer          `TurnoutCallback`, if `turnout_report` is set

axolotl logs an `ImportError` of a plugin and trains without the plugin. So the only one raised here
is for axolotl itself, without which no axolotl asks; everything else is a `ValueError` later.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

try:
    from axolotl.integrations.base import (  # type: ignore[import-not-found,unused-ignore]
        BasePlugin,
    )
    from axolotl.utils.logging import get_logger  # type: ignore[import-not-found,unused-ignore]
    from pydantic import BaseModel, Field, model_validator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"turnout.integrations.axolotl needs axolotl, and {error.name} is not installed; expected "
        "axolotl 0.19 with all it imports. pip install 'axolotl>=0.19'",
        name=error.name,
    ) from error

from torch import nn
from transformers import TrainerCallback

from turnout._version import __version__
from turnout.experts.ops import check_backend
from turnout.integrations import axolotl_rules as rules
from turnout.integrations.patching import patch
from turnout.integrations.report import Report
from turnout.integrations.trainer import TurnoutCallback
from turnout.integrations.versions import check_versions, newer_than
from turnout.specs import AuxLossChoice, BackendName, Recompute, RouterChoice

BEFORE = "0.18"  # axolotl must be newer than this release
TESTED = "0.19"
# axolotl shows messages of its own loggers, by their prefix
LOG = get_logger("axolotl.integrations.turnout")


class TurnoutArgs(BaseModel):
    """The keys of an axolotl config that are turnout's; the meaning is that of `turnout.patch`."""

    turnout_backend: BackendName = Field(
        default=rules.DEFAULTS["turnout_backend"],
        description="auto, or the one back end for the products of the experts",
    )
    turnout_router: RouterChoice = Field(
        default=rules.DEFAULTS["turnout_router"],
        description="model keeps the model's routers, fused swaps them for turnout's kernel",
    )
    turnout_aux_loss: AuxLossChoice = Field(
        default=rules.DEFAULTS["turnout_aux_loss"],
        description="model keeps the model's load-balancing loss, fused computes it in turnout",
    )
    turnout_recompute: Recompute = Field(
        default=rules.DEFAULTS["turnout_recompute"],
        description="gate_up computes the pre-activation again in backward instead of keeping it",
    )
    turnout_tune: Literal["first-use"] | None = Field(
        default=rules.DEFAULTS["turnout_tune"],
        description="first-use searches the config of a kernel where a problem is first met",
    )
    turnout_report: bool | Annotated[str, Field(min_length=1)] = Field(
        default=rules.DEFAULTS["turnout_report"],
        description="true writes turnout-report.jsonl to output_dir; a string names another file",
    )

    @model_validator(mode="before")
    @classmethod
    def check_turnout_conflicts(cls, data: Any) -> Any:
        """Refuse misspelt keys, and keys that give the experts to somebody else."""
        problems = rules.unknown(data) + rules.refusals(data)
        if problems:
            raise ValueError("; ".join(problems))
        return data


class TurnoutPlugin(BasePlugin):
    """Patches the model that axolotl has loaded; see the module's docstring."""

    def __init__(self) -> None:
        super().__init__()
        self._report: Report | None = None

    def register(self, cfg: Any) -> None:
        """Raises `ValueError` for an axolotl, transformers or PEFT that is too old."""
        if not newer_than("axolotl", BEFORE):
            raise ValueError(
                f"axolotl is older than {TESTED}; expected {TESTED} or newer. "
                f"pip install -U 'axolotl>={TESTED}'"
            )
        if newer_than("axolotl", TESTED):
            LOG.warning("turnout %s is tested with axolotl %s, not newer", __version__, TESTED)
        check_versions()

    def get_input_args(self) -> str:
        """The class that axolotl adds to its schema."""
        return f"{TurnoutArgs.__module__}.{TurnoutArgs.__name__}"

    def pre_model_load(self, cfg: Any) -> None:
        """What would fail after minutes of loading fails here.

        Raises:
            ValueError: a conflict, also one that another plugin has written into `cfg`.
            Unsupported: this version of turnout does not have the back end, or nothing on this
                machine can run it.
        """
        _refuse(cfg)
        check_backend(rules.patch_options(cfg)["backend"])
        for note in rules.notes(cfg):
            LOG.warning("turnout: %s", note)

    def post_lora_load(self, cfg: Any, model: nn.Module) -> None:
        """`turnout.patch`. axolotl calls this without adapters too, so it is the one place.

        Raises:
            ValueError: a conflict by a plugin listed after this one, or no MoE layer in the model.
            Unsupported: an option that this version does not have.
        """
        self._report = None
        _refuse(cfg)
        if cfg.get("merge_lora"):
            LOG.info("turnout: merge_lora is set and nothing trains; the model stays as it is")
            return
        self._report = patch(model, **rules.patch_options(cfg))

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """After axolotl's last own changes: the summary.

        Raises:
            ValueError: `lora_mlp_kernel` took a block with fused experts.
        """
        report, self._report = self._report, None
        if report is None:
            return
        taken = rules.taken_blocks(model, report)
        if taken:
            raise ValueError(
                f"lora_mlp_kernel replaced the forward of {taken[0]} and {len(taken) - 1} others, "
                "which hold routed experts; expected dense MLPs only, as those experts would not "
                "run. Set lora_mlp_kernel: false"
            )
        for line in rules.summary(report):
            LOG.info(line)
        if not report.counts.get("fused"):
            LOG.warning("turnout: no layer is fused, the training runs as it would without turnout")

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """`TurnoutCallback`, if `turnout_report` is set."""
        asked = rules.report_path(cfg)
        return [] if asked is None else [TurnoutCallback(asked.path)]


def _refuse(cfg: Any) -> None:
    problems = rules.refusals(cfg)
    if problems:
        raise ValueError("; ".join(problems))
