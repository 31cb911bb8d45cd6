"""What torchrun tells a process: who it is, among how many. Imports nothing slow."""

from __future__ import annotations

import dataclasses
import os
from typing import Self


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        rank: its number among all processes, from 0.
        size: processes in all, on all machines.
        local_rank: its number on this machine, from 0.
        restarts: how often torchrun has started the processes of this machine anew.
        keeps_store: whether torchrun's own store, where processes find each other, outlives that.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0
    keeps_store: bool = False

    @classmethod
    def here(cls) -> Self:
        """From the environment; a process of its own without torchrun.

        Source: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
        """
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
            return cls()
        return cls(
            rank=int(os.environ["RANK"]),
            size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            keeps_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
