"""What all tests share."""

pytest_plugins = ("prometheus_server", "stub_nvml")
