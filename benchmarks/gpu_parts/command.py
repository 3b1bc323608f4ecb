"""Part command: a corpus is prepared and a model trains by the commands of a user."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpu_parts import ROOT, Row, Setting


def rows(setting: Setting) -> Iterator[Row]:
    """Yield whether each command succeeds."""
    steps = setting.pick(200, 3)
    warmup = f"optimizer.schedule.warmup_steps={steps // 3}"
    with tempfile.TemporaryDirectory() as folder:
        shards = f"{folder}/corpus"
        training = [f"data.shards={shards}/train", f"train.steps={steps}", f"engine.device={setting.device.type}"]
        training += [f"run.root={folder}/runs", "tracking.enabled=false", warmup]
        for command in (
            ["prepare", str(ROOT / "pretrain"), "--include", "*.py", "--holdout", "0.1", "--out", shards],
            ["train", "debug", *training],
        ):
            done = byteloom(command, Path(folder))
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            yield Row(f"byteloom {command[0]}", None, "", " ".join(last), done.returncode == 0)


def byteloom(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the source tree."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    whole = [sys.executable, "-m", "pretrain.cli.entry", *command]
    return subprocess.run(whole, capture_output=True, text=True, check=False, env=environment, cwd=folder)
