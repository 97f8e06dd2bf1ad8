"""The shipped alerts over whole histories: each failure raises its own alerts, and no healthy run raises any."""

from __future__ import annotations

from pathlib import Path

import pytest
from histories import INTERVAL, Scenario, judge
from scenarios import SCENARIOS


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """What each scenario has raised."""
    return judge(SCENARIOS, tmp_path_factory.mktemp("scenarios"))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_scenario_raises_its_alerts(scenario: Scenario, raised: dict[str, set[str]]) -> None:
    """Exactly the pages and tickets that it should, at any time."""
    assert raised[scenario.name] == scenario.raises


@pytest.mark.long
def test_nothing_else_fires_between_the_minutes(tmp_path: Path) -> None:
    """The same where the rules are evaluated with every scrape."""
    found = judge(SCENARIOS, tmp_path, every=INTERVAL)
    assert found == {scenario.name: set(scenario.raises) for scenario in SCENARIOS}
