"""Under torchrun one process tunes and the others receive what it found.

The group is gloo's and waits as long as the tuning may take. Where the program has a group already,
that one is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from turnout.tuning import cache
from turnout.tuning.entry import Entry

_MARGIN = timedelta(minutes=10)
_LONGEST = timedelta(days=2)  # without a limit of one's own


@dataclass(slots=True)
class Share:
    """What one process knows: the first adds to `entries`, the others find `received`."""

    is_first: bool
    entries: list[Entry] = field(default_factory=list)
    received: list[Entry] = field(default_factory=list)


@contextmanager
def tuned_by_one(minutes: float | None = None) -> Iterator[Share]:
    """On the way out, the entries of rank 0 go to every process, and into its store.

    Also when rank 0 fails half-way: the others get what there is and do not wait for ever.
    """
    if not (dist.is_available() and (dist.is_initialized() or dist.is_torchelastic_launched())):
        yield Share(is_first=True)
        return
    ours = not dist.is_initialized()
    if ours:
        limit = _LONGEST if minutes is None else timedelta(minutes=minutes) + _MARGIN
        dist.init_process_group("gloo", timeout=limit)
    share = Share(is_first=dist.get_rank() == 0)
    try:
        yield share
    finally:
        _broadcast(share)
        if ours:
            dist.destroy_process_group()


def _broadcast(share: Share) -> None:
    sent: list[object] = [[entry.to_dict() for entry in share.entries]]
    dist.broadcast_object_list(sent, src=0)
    if not share.is_first:
        assert isinstance(sent[0], list)
        share.received = [Entry.from_dict(one) for one in sent[0]]
        if share.received:
            cache.store().put(share.received)
