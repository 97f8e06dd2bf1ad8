"""Settings: what is right by default, and one clear error for each that is not."""

from __future__ import annotations

from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrace.config import TracerConfig
from memtrace.errors import ConfigError

anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.lists(st.integers())
names = st.sampled_from(sorted(TracerConfig.__dataclass_fields__)) | st.text(max_size=12)
random_settings = st.dictionaries(names, anything, max_size=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"port": 70000}, "port must be 0..65535, got 70000"),
        ({"port": "16368"}, "port must be 0..65535, got '16368': write 16368"),
        ({"port": "none"}, "port must be 0..65535, got 'none'"),
        (
            {"device_limit_bytes": 12e9},
            "device_limit_bytes must be 1..9223372036854775807, got 12000000000.0: write 12000000000",
        ),
        (
            {"device_limit_bytes": "24GiB"},
            "device_limit_bytes must be 1..9223372036854775807, got '24GiB': write 25769803776",
        ),
        ({"max_tokens": "24GiB"}, "max_tokens must be 1..9223372036854775807, got '24GiB'"),
        ({"overhead_budget": "0.01"}, "overhead_budget must be 0..1, got '0.01': write 0.01"),
        ({"quiet": "yes"}, "quiet must be True or False, got 'yes': write True"),
        ({"config": None}, "unknown setting 'config': write the fields themselves, such as port=0"),
        ({"port": True}, "port must be 0..65535, got True"),
        ({"address": ""}, "address must be a host name or an IP address, got ''"),
        ({"adress": "0.0.0.0"}, "unknown setting 'adress': did you mean 'address'?"),
        ({"log_dir": ""}, "log_dir must be a path, got ''"),
        ({"log_dir": 3}, "log_dir must be a path, got 3"),
        ({"textfile_dir": ""}, "textfile_dir must be a path, got ''"),
        ({"log_max_bytes": 10}, "log_max_bytes must be 65536..9223372036854775807, got 10"),
        ({"run_name": " "}, "run_name must be a text that is not blank, got ' '"),
        ({"strict": 1}, "strict must be True or False, got 1: write True"),
        ({"tls_cert_file": "c.pem"}, "tls_cert_file is set without tls_key_file: TLS needs both, plain HTTP neither"),
        ({"tls_key_file": "k.pem"}, "tls_key_file is set without tls_cert_file: TLS needs both, plain HTTP neither"),
        ({"basic_auth_user": "u"}, "basic_auth_user is set without a password: basic auth needs both"),
        ({"basic_auth_password": "s3cret"}, "a password is set without basic_auth_user: basic auth needs both"),
        ({"basic_auth_password_file": "f"}, "a password is set without basic_auth_user: basic auth needs both"),
        ({"basic_auth_user": "a:b"}, "basic_auth_user must be a name without a colon, got 'a:b'"),
        (
            {"basic_auth_user": "u", "basic_auth_password": ""},
            "basic_auth_password must be a text that is not empty",
        ),
        (
            {"basic_auth_user": "u", "basic_auth_password": "s3cret", "basic_auth_password_file": "f"},
            "basic_auth_password and basic_auth_password_file are both set: one of them is enough",
        ),
    ],
)
def test_a_wrong_setting_is_told(wrong: dict[str, Any], message: str) -> None:
    """The message says what was wrong and what was expected, and never a secret."""
    with pytest.raises(ConfigError) as caught:
        TracerConfig.from_settings(wrong)
    assert str(caught.value) == message
    assert "s3cret" not in str(caught.value)


def test_the_environment_sets_what_code_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """One variable for each field, by its type; an argument wins, and a wrong value names its variable."""
    for variable, text in {
        "PORT": "0",
        "STEP_LOG": "no",
        "OVERHEAD_BUDGET": "0.01",
        "MAX_TOKENS": "",
        "PLAN": "p",
    }.items():
        monkeypatch.setenv(f"MEMTRACE_{variable}", text)
    config = TracerConfig(address="::1")
    assert (config.port, config.step_log, config.overhead_budget) == (0, False, 0.01)
    assert (config.max_tokens, config.plan, config.address) == (None, "p", "::1")
    assert TracerConfig.from_settings({"port": 7}).port == 7
    for text, message in {
        "99999": "MEMTRACE_PORT: port must be 0..65535, got 99999",
        "x": "MEMTRACE_PORT must be a whole number, got 'x'",
    }.items():
        monkeypatch.setenv("MEMTRACE_PORT", text)
        with pytest.raises(ConfigError) as caught:
            TracerConfig()
        assert str(caught.value) == message
    monkeypatch.setenv("MEMTRACE_DEVICE_LIMIT_BYTES", "24GiB")
    with pytest.raises(ConfigError, match=r"MEMTRACE_DEVICE_LIMIT_BYTES .*: write 25769803776$"):
        TracerConfig(port=1)
    monkeypatch.delenv("MEMTRACE_DEVICE_LIMIT_BYTES")
    monkeypatch.setenv("MEMTRACE_PORT", "1")
    with pytest.raises(ConfigError, match=r"^port must be"):
        TracerConfig(port=70000)


TOGETHER = {
    "basic_auth_user": "basic_auth_password",
    "basic_auth_password": "basic_auth_user",
    "basic_auth_password_file": "basic_auth_user",
    "tls_cert_file": "tls_key_file",
    "tls_key_file": "tls_cert_file",
}
"""Settings that need another one."""


WITH_VARIABLE = [setting for setting in fields(TracerConfig) if setting.name != "on_record"]


@pytest.mark.parametrize("setting", WITH_VARIABLE, ids=lambda setting: setting.name)
def test_every_setting_has_a_variable(setting: Field[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field is read from its own variable, and no other field is."""
    default = TracerConfig()
    kind = setting.type.split(" | ")[0]
    values = {"bool": not getattr(default, setting.name), "float": 0.25, "str": "set"}
    values |= {"str": "env"} if setting.name == "otlp_endpoint" else {}
    value = values.get(kind, 7 if setting.name == "port" else 70000)
    monkeypatch.setenv(f"MEMTRACE_{setting.name.upper()}", str(value))
    if setting.name in TOGETHER:
        monkeypatch.setenv(f"MEMTRACE_{TOGETHER[setting.name].upper()}", "too")
    config = TracerConfig()
    changed = {name.name for name in fields(config) if getattr(config, name.name) != getattr(default, name.name)}
    assert changed == {setting.name, TOGETHER.get(setting.name, setting.name)}
    assert getattr(config, setting.name) == value


@given(random_settings)
def test_random_settings_are_right_or_an_error(chosen: dict[str, Any]) -> None:
    """Whatever is set, the outcome is a configuration or a ConfigError."""
    try:
        config = TracerConfig.from_settings(chosen)
    except ConfigError as error:
        assert str(error)
    else:
        assert all(getattr(config, name) == value for name, value in chosen.items())


def test_every_setting_is_explained() -> None:
    """Each field has its docstring below it: the settings' reference is made of them."""
    source = Path(__file__).parent.parent.joinpath("src", "memtrace", "config.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    for name in TracerConfig.__dataclass_fields__:
        (at,) = (number for number, line in enumerate(lines) if line.startswith(f"    {name}: "))
        assert lines[at + 1].lstrip().startswith('"""'), name


def test_the_log_directory_has_a_default() -> None:
    """What was set comes first, else what the edge proposes."""
    assert TracerConfig().log_path(Path("out")) == Path("out")
    assert TracerConfig(log_dir="mine").log_path(Path("out")) == Path("mine")
