"""What all tests share."""

pytest_plugins = ("stub_nvml",)
