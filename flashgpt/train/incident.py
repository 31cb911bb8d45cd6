"""What is kept of a step that the guard refused: enough to do it again, anywhere.

    incidents/step_00000124/
      incident.json                    why, where, numbers per layer, seeds, receipt, config
      batch.safetensors                the tokens of the step
      config.json  model.safetensors   the weights before it (of the newest KEEP_WEIGHTS incidents)

`flashgpt train --replay FOLDER` does the step again, on either setting of the switch.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flashgpt.interop import huggingface
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import RunConfig
from flashgpt.toml import from_tree
from flashgpt.train.checkpoint import write_json
from flashgpt.train.diagnose import Findings
from flashgpt.train.feed import MicroBatch
from flashgpt.train.record import versions
from flashgpt.train.step import Done

FOLDER = "incidents"
KEEP_WEIGHTS = 3


@dataclasses.dataclass(frozen=True)
class Incident:
    """A refused step.

    Attributes:
        step: its number, from 0.
        dropout_seed: of its masks.
        loss_scale: fp16's; 1 without.
        windows: per row of the batch, the token file and the offset (tokens) where it starts.
        findings: of the step done again, layer by layer, right after it.
    """

    step: int
    reason: str
    loss: float
    norm: float
    z_loss: float
    z_norm: float
    dropout_seed: int
    loss_scale: float
    windows: list[tuple[int, int]]
    findings: Findings
    receipt: list[str]
    config: RunConfig
    micros: list[MicroBatch]

    def save(self, run: Path, model: GPTModel) -> Path:
        """Writes the incident's folder, whole or not at all, and returns it.

        Raises:
            OSError: it cannot be written.
        """
        final = run / FOLDER / name_of(self.step)
        temporary = final.with_name(f".{final.name}")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            huggingface.save(model, temporary, eos_id=None)
            tensors = {
                f"{name}.{i}": getattr(micro, name).cpu()
                for i, micro in enumerate(self.micros)
                for name in ("ids_BT", "targets_BT")
            }
            save_file(tensors, temporary / "batch.safetensors")
            write_json(temporary / "incident.json", self._json())
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(getattr(error, "errno", None), f"{final}: {error}") from error
        weights = final.parent.glob("step_*/model.safetensors")
        by_age = sorted(weights, key=lambda path: path.stat().st_mtime_ns)
        for old in by_age[:-KEEP_WEIGHTS]:
            old.unlink()
        return final

    def _json(self) -> dict[str, Any]:
        plain = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("findings", "config", "micros")
        }
        config = {
            name: {key: value for key, value in section.items() if value is not None}
            for name, section in dataclasses.asdict(self.config).items()
        }
        micros = [{"first_row": m.first_row, "weight": m.weight} for m in self.micros]
        findings = dataclasses.asdict(self.findings)
        return plain | {
            "findings": findings,
            "micros": micros,
            "versions": versions(),
            "config": config,
        }

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads what `save` wrote.

        Raises:
            ValueError: no incident's folder, or a damaged one.
        """
        path = folder / "incident.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            tensors = load_file(folder / "batch.safetensors")
            micros = [
                MicroBatch(tensors[f"ids_BT.{i}"], tensors[f"targets_BT.{i}"], **micro)
                for i, micro in enumerate(stored.pop("micros"))
            ]
            stored.pop("versions")
            findings = Findings(**stored.pop("findings"))
            config = from_tree(stored.pop("config"), str(path))
            return cls(**stored, findings=findings, config=config, micros=micros)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} is no incident's folder, or damaged: {error}") from error

    def on(self, device: torch.device) -> list[MicroBatch]:
        """Its batch on a device."""
        return [
            dataclasses.replace(
                micro, ids_BT=micro.ids_BT.to(device), targets_BT=micro.targets_BT.to(device)
            )
            for micro in self.micros
        ]


def name_of(step: int) -> str:
    """Folder name of the incident at step `step`, counted from 0, as the log counts: from 1."""
    return f"step_{step + 1:08d}"


def reason(done: Done) -> str:
    """Why the guard refused a step, in a few words."""
    for name, value in (("loss", done.loss), ("gradient norm", done.norm)):
        if value != value or abs(value) == float("inf"):
            return f"{name} is {value}"
    if done.z_loss >= done.z_norm:
        return f"loss {done.loss:.3f} is {done.z_loss:.1f} standard deviations above the last steps"
    return f"gradient norm {done.norm:.3g} is {done.z_norm:.1f} standard deviations above"
