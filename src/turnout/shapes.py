"""Named shapes of expert layers: the sizes that benchmarks and tuning speak of.

rows S = tokens * top_k,  gate_up (experts, 2 * intermediate, hidden),  down (experts, hidden,
intermediate)
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of one call: T tokens, H hidden, F intermediate, E experts, K experts per token."""

    name: str
    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        for field in fields(self):
            got = getattr(self, field.name)
            if field.name != "name" and (isinstance(got, bool) or got < 1):
                raise ValueError(f"Shape.{field.name} is {got!r}; expected at least 1")
        if self.top_k > self.experts:
            raise ValueError(
                f"Shape.top_k is {self.top_k}; expected at most {self.experts}, the experts"
            )

    @property
    def rows(self) -> int:
        """S, the rows of the grouped products."""
        return self.tokens * self.top_k


SHAPES = (
    Shape("qwen3-30b", 16384, 2048, 768, 128, 8),
    Shape("olmoe", 16384, 2048, 1024, 64, 8),
    Shape("mixtral", 8192, 4096, 14336, 8, 2),
    Shape("gptoss-20b", 16384, 2880, 2880, 32, 4),
    Shape("sonic-readme", 32768, 4096, 1024, 128, 8),
    Shape("small-t", 512, 2048, 768, 128, 8),
)
# For tests and machines without a GPU; no model has it, and no list names it.
TINY = Shape("tiny", 64, 64, 32, 8, 2)


def shape_named(name: str) -> Shape:
    """The shape called `name`.

    Raises:
        ValueError: there is no such shape.
    """
    for shape in (*SHAPES, TINY):
        if shape.name == name:
            return shape
    names = ", ".join(shape.name for shape in SHAPES)
    raise ValueError(
        f"shape is {name!r}; expected one of {names}. Give one of these, or build a "
        "turnout.shapes.Shape"
    )
