"""What planning a resume costs the driver."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table


def resume(args: argparse.Namespace) -> None:
    """Seconds and memory of planning a resume over many recorded rows, in a process of its own."""
    program = [sys.executable, str(Path(__file__).parents[1] / "resume_planning.py")]
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(args.folder or scratch)
        print(f"writing {args.rows:,} rows and their records, in {args.files:,} files", file=sys.stderr)
        sizes = ["--rows", str(args.rows), "--files", str(args.files)]
        subprocess.run([*program, "make", folder, *sizes], check=True)
        done = subprocess.run([*program, "measure", folder], check=True, stdout=subprocess.PIPE, text=True)
    found = {**json.loads(done.stdout), "files": args.files, "cores": os.cpu_count(), "load": os.getloadavg()}
    table = Table("", "seconds", "of a CPU", "MiB added, peak so far")
    planning = {name: found[f"planning_{name}"] for name in ("seconds", "cpu_seconds")}
    planning["peak_mib_added"] = found["planning_mib_added"]
    for name, step in {**found["steps"], "planning, all in all": planning}.items():
        times = (f"{step[kind]:.1f}" for kind in ("seconds", "cpu_seconds"))
        table.add_row(name, *times, f"{step['peak_mib_added']:.0f}")
    Console(width=110).print(table)
    print(
        f"{found['recorded']:,} recorded, {found['pending']:,} pending; bytes a row on the driver: "
        f"{found['bytes_a_manifest_row']:.0f} for the manifest, {found['bytes_a_recorded_row']:.0f} for the records; "
        f"{found['bytes_shipped_a_row']:.0f} to each node"
    )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
