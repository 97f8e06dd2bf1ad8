"""Writes the dashboards: `python integrations/grafana/build_dashboards.py [DIRECTORY]`.

Needs `grafana-foundation-sdk==1769699379!11.6.0`; the JSON works in Grafana 11.6 and later. Names, labels, order and
colours come from the vocabulary and the metric catalogue of memtrace. One module each: `fleet`, `run`, `ranks`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fleet import fleet_dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from ranks import ranks_dashboard
from run import run_dashboard

HERE = Path(__file__).resolve().parent

DASHBOARDS = {
    "memtrace-fleet.json": fleet_dashboard,
    "memtrace-run.json": run_dashboard,
    "memtrace-ranks.json": ranks_dashboard,
}


def main(directory: Path) -> None:
    """Writes the JSON of each dashboard; panels are numbered, so that Grafana keeps links to them."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in DASHBOARDS.items():
        dashboard = make().build()
        for position, panel in enumerate(dashboard.panels or (), 1):
            panel.id_val = position
        text = json.dumps(dashboard, cls=JSONEncoder, indent=2, sort_keys=True)
        (directory / name).write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "dashboards")
