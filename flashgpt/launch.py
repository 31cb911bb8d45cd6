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
        most_restarts: torchrun's `--max-restarts`.
        name: of this launch by torchrun, the same after a restart; of another one a different one,
            unless a --rdzv-id was given twice.
        machines: on which it runs.
        keeps_store: whether torchrun's own store, where processes find each other, outlives a
            restart, with the addresses of processes that are gone
            (https://github.com/pytorch/pytorch/issues/135712).
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0
    most_restarts: int = 0
    name: str | None = None
    machines: int = 1
    keeps_store: bool = False

    @classmethod
    def here(cls) -> Self:
        """From the environment; a process of its own without torchrun.

        Source: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
        """
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
            return cls()
        return cls(
            rank=_number("RANK"),
            size=_number("WORLD_SIZE"),
            local_rank=_number("LOCAL_RANK"),
            restarts=_number("TORCHELASTIC_RESTART_COUNT"),
            most_restarts=_number("TORCHELASTIC_MAX_RESTARTS"),
            name=os.environ.get("TORCHELASTIC_RUN_ID"),
            machines=_number("GROUP_WORLD_SIZE", 1),
            keeps_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    def check(self) -> None:
        """Refuses what would hang after a restart.

        Raises:
            ValueError: machines count their restarts each for itself, so nothing tells which
                addresses in a store that is kept are of now.
        """
        if self.keeps_store and self.machines > 1 and self.most_restarts:
            raise ValueError(
                "--max-restarts on several machines needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1; "
                "export it before torchrun, on each"
            )


def _number(name: str, default: int = 0) -> int:
    return int(os.environ.get(name, default))
