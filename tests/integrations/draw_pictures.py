"""Draws the pictures of the dashboards anew; integrations/README.md has the command.

They are the ones that the tests draw, of the runs that the tests make. Look at them before they are committed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from promql import ROOT
from test_dashboards import GRAFANA, OF_RUN, draw, of_four_ranks
from test_fleet import FLEET, all_runs
from test_shown_values import RUNS, first_scrape, of_all_runs

PICTURES = ROOT / "docs" / "pictures"
OF_RANKS = GRAFANA / "dashboards" / "memtrace-ranks.json"
RERUN = RUNS[1]


def main() -> int:
    wrong: list[str] = []
    with TemporaryDirectory() as made:
        directory = Path(made)
        for name in ("four", "all", "fleet"):
            (directory / name).mkdir()

        def picture(name: str, dashboard: Path, url: str, parameters: str = "") -> None:
            drawn = directory / f"grafana-{name}.png"
            wrong.extend(draw(dashboard, url, drawn, parameters).errors)
            (PICTURES / drawn.name).write_bytes(drawn.read_bytes())

        with of_four_ranks(directory / "four") as url:
            picture("run", OF_RUN, url)
            picture("ranks", OF_RANKS, url)
        with of_all_runs(first_scrape(), directory / "all") as url:
            chosen = {"job": RERUN.job, "run": RERUN.name, "run_id": RERUN.run_id}
            window = "&from=now-15m"
            picture("rerun", OF_RUN, url, "".join(f"&var-{name}={value}" for name, value in chosen.items()) + window)
        with all_runs(directory / "fleet") as (url, _):
            picture("fleet", FLEET, url)
    print(*(wrong or ["drawn"]), sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
