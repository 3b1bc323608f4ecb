"""Everything that needs a GPU, in one command: is it right, does it wait, how fast is it, does it fit.

python benchmarks/gpu.py [--parts NAME ...] [--again] [--toy] [--device cpu] [--out FOLDER]

It needs torch, numpy, pydantic and pyyaml, and no installation of Byteloom. A part that needs more is left out, and the
table names the missing package. The default folder is build/gpu:

    results.json    every measurement, by part, with the versions
    trace.json      one step of the largest model, for https://ui.perfetto.dev

Parts run one after another, in a process of their own. The results are written after each part. A second run does the
parts that are not done, or that failed; `--again` does all of them again. A part that kills the process is noted as
crashed, and the next part begins in a new process. Measurements of another machine, torch or commit are done again.

`--toy` has small models and few repetitions. It is the default on a CPU, where it only shows that each part runs.
"""

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gpu_parts import PARTS, Part, Setting  # noqa: E402 - the path comes first
from gpu_parts.packages import is_installed, stand_in_for_missing_packages  # noqa: E402

LIMIT = 6
"""A part may take this many times as long as planned."""
LEAST_LIMIT_SECONDS = 120
FAILED = ("failed", "crashed")


def main() -> int:
    """Run the parts that are not done, and return 1 if one of them failed."""
    chosen = arguments()
    stand_in_for_missing_packages()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products need it before the first one
    os.environ["XDG_CACHE_HOME"] = str(chosen.out.resolve())  # measured peaks belong to the results
    setting = Setting.of(chosen.device, chosen.out, toy=chosen.toy)
    if chosen.worker:
        work(chosen.parts, setting)
        return 0
    results = Results(setting.folder, setting.versions(), again=chosen.again)
    names = chosen.parts or list(PARTS)
    results.drop_failed()
    while ahead := [name for name in names if not results.has(name)]:
        command = [sys.executable, str(Path(__file__)), "--worker", "--device", setting.device.type]
        command += ["--out", str(setting.folder), *(["--toy"] if setting.toy else []), "--parts", *ahead]
        code = subprocess.run(command, check=False).returncode
        results.read()
        if crashed := [name for name in ahead if not results.has(name)]:
            results.add(crashed[0], {"status": "crashed", "reason": f"its process ended with exit code {code}"})
    print(results.table(names))
    return int(any(results.parts[name]["status"] in FAILED for name in names))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="parts to run; all by default")
    parser.add_argument("--again", action="store_true", help="also run parts that are done")
    parser.add_argument("--toy", action="store_true", help="small models and few repetitions")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is a device")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu", help="folder of the results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def work(names: list[str], setting: Setting) -> None:
    """Run parts in this process, and write the result of each."""
    results = Results(setting.folder, None)
    setting.set_up()
    for name in names:
        part = PARTS[name]
        print(f"{name}: {part.title}", flush=True)
        limit = max(LIMIT * part.seconds, LEAST_LIMIT_SECONDS)
        faulthandler.dump_traceback_later(limit, exit=True)
        begin = time.perf_counter()
        result = result_of(part, setting)
        faulthandler.cancel_dump_traceback_later()
        results.add(name, result | {"seconds": round(time.perf_counter() - begin, 2)})
        setting.free_memory()


def result_of(part: Part, setting: Setting) -> dict[str, Any]:
    """Return the result of a part as JSON."""
    if missing := [package for package in part.needs if not is_installed(package)]:
        return {"status": "left out", "reason": f"missing: {', '.join(missing)}"}
    if part.needs_gpu and setting.device.type != "cuda":
        return {"status": "left out", "reason": "it needs a GPU"}
    rows = []
    try:
        for row in part.run(setting):
            rows.append(row)
            print(f"    {row}", flush=True)
    except Exception as error:  # the other parts still run
        traceback.print_exc()
        status = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    else:
        wrong = [row.name for row in rows if row.is_right is False]
        status = {"status": "failed", "reason": f"wrong: {'; '.join(wrong)}"} if wrong else {"status": "done"}
    return status | {"rows": [asdict(row) for row in rows]}


class Results:
    """Results by part, in a file.

    Args:
        folder: of the file.
        versions: that the results depend on. Results of others are dropped. None takes those of the file.
        again: whether to drop all results.
    """

    def __init__(self, folder: Path, versions: dict[str, str] | None, *, again: bool = False) -> None:
        self._path = folder / "results.json"
        self._versions = versions or {}
        self.parts: dict[str, Any] = {}
        if not again and self._path.exists():
            self.read()
            if versions not in (None, self._versions):
                self._versions, self.parts = versions, {}
        if versions is not None:
            self._write()

    def read(self) -> None:
        """Read what is written, also by another process."""
        written = json.loads(self._path.read_text(encoding="utf-8"))
        self._versions, self.parts = written["versions"], written["parts"]

    def has(self, name: str) -> bool:
        """Return whether a part has a result."""
        return name in self.parts

    def drop_failed(self) -> None:
        """Drop the results of parts that failed or crashed."""
        self.parts = {name: result for name, result in self.parts.items() if result["status"] not in FAILED}
        self._write()

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Write the result of a part."""
        self.parts[name] = result
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".draft")
        draft.write_text(json.dumps({"versions": self._versions, "parts": self.parts}, indent=1), encoding="utf-8")
        draft.replace(self._path)  # a run that is killed leaves the old file or the new one

    def table(self, names: list[str]) -> str:
        """Return a table of parts."""
        lines = [", ".join(f"{name} {value}" for name, value in self._versions.items()), ""]
        for name in names:
            result = self.parts[name]
            seconds = f", {result['seconds']:.0f} s" if "seconds" in result else ""
            reason = f" ({result['reason']})" if "reason" in result else ""
            lines.append(f"{name}: {result['status']}{reason}{seconds}")
            for row in result.get("rows", []):
                verdict = {None: "", True: "right", False: "WRONG"}[row["is_right"]]
                value = "" if row["value"] is None else f"{row['value']:.4g}"
                lines.append(
                    f"    {row['name']:<58} {value:>10} {row['unit']:<10} {verdict:<6} {row['detail']}".rstrip()
                )
        return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
