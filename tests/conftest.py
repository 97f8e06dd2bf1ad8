"""What all tests share."""

pytest_plugins = ("nothing_left", "prometheus_server", "stub_nvml")
