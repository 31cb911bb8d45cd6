"""Does a refused step again, from its incident's folder alone."""

from __future__ import annotations

from pathlib import Path

from flashgpt.attention import kernels
from flashgpt.interop import huggingface
from flashgpt.runconfig import RunConfig
from flashgpt.tokenizer import Tokenizer
from flashgpt.train.diagnose import Findings, diagnose
from flashgpt.train.incident import Incident
from flashgpt.train.parts import build


def replay(folder: Path, config: RunConfig) -> tuple[Incident, Findings, list[str]]:
    """The incident, what is found now, and the receipt of the kernels that served.

    Same weights, tokens and dropout masks; the switch, the device, the precision and the dropout
    masks' kind may be others.

    Raises:
        ValueError: no incident's folder, or its weights are gone.
    """
    incident = Incident.load(folder)
    if not (folder / "model.safetensors").exists():
        raise ValueError(
            f"{folder} has no weights any more; only those of the newest incidents are kept"
        )
    model = huggingface.load(folder)
    model.set_attention(use_flash=config.model.use_flash)
    parts = build(model, Tokenizer.bytes(), config.train)
    parts.guard.set_scale(incident.loss_scale)
    kernels.clear_receipt()
    findings = diagnose(parts, incident.on(parts.device), incident.dropout_seed)
    return incident, findings, kernels.receipt()
