"""What all tests share."""

from hypothesis import HealthCheck, settings

pytest_plugins = ("nothing_left", "prometheus_server", "stub_nvml")

# The same examples every time, on every machine, and no limit that the clock decides. `make test-long` tries fresh ones
# (`--hypothesis-profile=fresh`); what those find becomes an `@example` of its test.
_SETTINGS = {"database": None, "deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("same", derandomize=True, **_SETTINGS)
settings.register_profile("fresh", derandomize=False, max_examples=1000, print_blob=True, **_SETTINGS)
settings.load_profile("same")
