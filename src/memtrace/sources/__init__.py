"""Where facts come from: the only code that asks torch's allocators, the driver or the operating system."""
