"""The comparison of devices: what it runs and writes, and that it sees curves that part.

pytest tests/test_benchmark_devices.py
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import devices
from flashgpt.toml import load_toml

WAYS = ("cpu", "control", "gpu", "ddp", "fsdp")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], str | None]]:
    """Commands, and the GPUs they see; each leaves a run whose losses part a little."""
    seen: list[tuple[list[str], str | None]] = []

    def run(command: list[str], cwd: Path, env: dict[str, str]) -> Any:
        seen.append((command[1:], env.get("CUDA_VISIBLE_DEVICES")))
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        off = 1e-6 * len(seen)
        records = [{"loss": 5 + off}, {"loss": 4 + 2 * off}, {"step": 2, "val_loss": 4.5}]
        (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        (out / "state.json").write_text(json.dumps({"receipt": ["blocked served"]}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "device_name", lambda kind: f"a {kind}")
    monkeypatch.setattr(devices, "subprocess", SimpleNamespace(run=run))
    return seen


def test_each_way_is_a_command_of_one_file(
    ran: list[tuple[list[str], str | None]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert devices.main(["--steps", "10", "--out", str(tmp_path)]) == 0
    commands = [command for command, _ in ran]
    assert len({next(word for word in c if word.endswith("run.toml")) for c in commands}) == 1
    assert [seen == "" for _, seen in ran] == [True, True, False, False, False]
    assert [c[1] == "torch.distributed.run" for c in commands] == [False] * 3 + [True] * 2
    assert commands[-1][-2:] == ["--train.parallel", "fsdp"]
    config = load_toml(tmp_path / "run.toml")
    assert config.train.precision == "fp32" and config.train.device == "auto"
    record = json.loads((tmp_path / "devices.json").read_text())
    assert [row["way"] for row in record["rows"]] == list(WAYS)
    assert record["rows"][2]["apart"] == pytest.approx([2e-6, 4e-6])
    assert (tmp_path / "devices.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row.get("holds") for row in last] == [None, None, True, True, True]


@pytest.mark.parametrize(
    ("losses", "holds"),
    [
        ([5.0, 4.02], True),
        ([5.0, 4.04], False),  # more than three times the control
        ([5.0001, 4.0], False),  # not the same first step
    ],
)
def test_a_curve_that_parts_is_told(losses: list[float], holds: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"way": "cpu", "losses": [5.0, 4.0]},
        {"way": "control", "losses": [5.0, 4.01]},
        {"way": "ddp", "losses": losses},
    ]
    devices.judge(rows)
    assert rows[2]["holds"] is holds and "holds" not in rows[1]


def test_a_run_that_fails_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        devices, "train", lambda way, file: {"way": way, "failed": "ended with status 3"}
    )
    assert devices.main(["--out", str(tmp_path)]) == 1
    assert "cpu      failed: ended with status 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "found"), [(0, {"ddp", "fsdp"}), (1, {"gpu"}), (2, {"gpu", "ddp", "fsdp"})]
)
def test_ways_need_their_devices(gpus: int, found: set[str]) -> None:
    assert set(devices.ways(gpus)) == {"cpu", "control", *found}
