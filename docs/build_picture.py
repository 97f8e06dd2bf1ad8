"""Draws docs/table.png: the table of a traced step, as a terminal shows it.

    python docs/build_picture.py tests/fixtures/gpu/llama-3-8b/steps-rank0.jsonl

Needs Debian's chromium.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from memtrace.exporters.run_directory.steplog import read_step_log
from memtrace.exporters.table import TABLE_WIDTH, step_table

PICTURE = Path(__file__).parent / "table.png"
PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; padding: 18px 22px; background: #fff; width: max-content }}
pre {{ font: 14px/1.25 "DejaVu Sans Mono", monospace; margin: 0; color: {foreground} }}
{stylesheet}</style><pre>{code}</pre>"""


def main() -> None:
    """Draws the last traced step of a log."""
    traced = [record for record in read_step_log(Path(sys.argv[1])) if record.traced]
    console = Console(record=True, width=TABLE_WIDTH, force_terminal=True, color_system="truecolor", file=sys.stderr)
    console.print(step_table(traced[-1]))
    with tempfile.TemporaryDirectory() as directory:
        page = Path(directory) / "table.html"
        page.write_text(console.export_html(code_format=PAGE), encoding="utf-8")
        subprocess.run(
            [
                "chromium",
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                f"--user-data-dir={directory}/profile",
                "--force-device-scale-factor=1.5",
                "--window-size=900,620",
                f"--screenshot={PICTURE}",
                page.as_uri(),
            ],
            check=True,
            capture_output=True,
        )


if __name__ == "__main__":
    main()
