"""The shipped rules: what promtool says of them, and that they use only what exists."""

import re
import subprocess

import pytest
import yaml
from promql import ROOT, RULES, rules, unknown

TESTS = RULES.with_name("memtrace.rules.test.yml")
ALERTS = [rule for rule in rules() if "alert" in rule]
NAMES = [rule["alert"] for rule in ALERTS]
DANGER = "(In danger|Not in danger|Perhaps in danger|Ended|Stands still|Has not begun)"
"""Whether training is in danger; then come page or ticket, and how long is left."""
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)


def test_rules_are_valid() -> None:
    """Prometheus accepts the file."""
    result = promtool("check", "rules", str(RULES))
    assert result.returncode == 0, result.stderr


def test_alerts_are_silent_at_the_boundary_and_firing() -> None:
    """All unit tests of promtool pass."""
    result = promtool("test", "rules", str(TESTS))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("rule", ALERTS, ids=NAMES)
def test_alert_is_tested(rule: dict[str, object]) -> None:
    """Each alert has a promtool test with a silent run, one at the boundary and one that fires."""
    cases = [
        case
        for case in yaml.safe_load(TESTS.read_text())["tests"]
        if any(test["alertname"] == rule["alert"] for test in case["alert_rule_test"])
    ]
    assert len(cases) == 1
    runs = {match for series in cases[0]["input_series"] for match in re.findall(r'run="(\w+)"', series["series"])}
    assert {"silent", "boundary", "firing"} <= runs
    fired = [alert for test in cases[0]["alert_rule_test"] for alert in test["exp_alerts"]]
    assert [alert["exp_labels"]["run"] for alert in fired] == ["firing"]


@pytest.mark.parametrize("rule", ALERTS, ids=NAMES)
def test_alert_that_waits_is_tested_before_it_has_waited(rule: dict[str, object]) -> None:
    """An alert with `for` has a test in which it does not fire yet."""
    times = [
        bool(test["exp_alerts"])
        for case in yaml.safe_load(TESTS.read_text())["tests"]
        for test in case["alert_rule_test"]
        if test["alertname"] == rule["alert"]
    ]
    assert times == ([False, True] if "for" in rule or len(times) == 2 else [True])


@pytest.mark.parametrize("rule", list(rules()), ids=lambda rule: rule.get("alert") or rule["record"])
def test_rule_uses_what_exists(rule: dict[str, str]) -> None:
    """Every metric and label of the expression is in the catalogue or recorded by another rule."""
    assert unknown(rule["expr"]) == []


@pytest.mark.parametrize("rule", ALERTS, ids=NAMES)
def test_alert_says_what_it_means_and_where_to_read_on(rule: dict[str, dict[str, str]]) -> None:
    """Severity, summary, description, and a section of the runbook: its first line, and three parts."""
    assert rule["labels"]["severity"] in {"info", "warning", "critical"}
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    name = str(rule["alert"])
    assert rule["annotations"]["runbook_url"] == "{{ $externalURL }}/consoles/memtrace-runbook.html#" + name.lower()
    section = RUNBOOK.split(f"\n## {name}\n")[1].split("\n## ")[0]
    urgency = "Page" if rule["labels"]["severity"] == "critical" else "Ticket"
    first = section.strip().split("\n")[0]
    assert re.fullmatch(rf"\*\*{DANGER}[^.]*\. {urgency}[^.]*\. .+\.\*\*", first), first
    for part in ("**What it means.**", "**How to look.**", "**What to do.**"):
        assert part in section


def test_runbook_has_no_section_without_an_alert() -> None:
    """A section for an alert that no longer exists is found."""
    assert re.findall(r"^## (Memtrace\w+)$", RUNBOOK, re.MULTILINE) == NAMES


def test_runbook_uses_what_exists() -> None:
    """Every expression of the runbook uses only what is exported or recorded."""
    found = re.findall(r"```promql\n(.*?)```", RUNBOOK, re.DOTALL)
    assert found
    assert [wrong for expression in found for wrong in unknown(expression)] == []


def test_thresholds_are_in_one_place() -> None:
    """No alert compares with a number of its own but 0."""
    for rule in ALERTS:
        numbers = re.findall(r"[<>]=?\s*(?:bool\s+)?(\d[\d.]*)", rule["expr"])
        assert set(numbers) <= {"0"}, rule["alert"]


def test_unknown_names_are_found() -> None:
    """The check finds a metric, a label and a grouping that do not exist."""
    assert unknown('sum by (pid) (memtrace_memory_bytes{layer="3"}) + memtrace_vram_bytes') == [
        "memtrace_vram_bytes",
        "memtrace_memory_bytes{layer}",
        "by pid",
    ]
