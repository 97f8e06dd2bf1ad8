"""The text of the allocator's settings: read as torch reads it, and written again."""

from __future__ import annotations

import pytest

from memtrace.allocator.settings import INTERVALS, AllocatorSettings, parse_settings
from memtrace.errors import ConfigError
from memtrace.record.units import MIB
from memtrace.sources.cuda.settings_variable import variable_for


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", AllocatorSettings()),
        ("expandable_segments:True", AllocatorSettings(expandable_segments=True)),
        (" max_split_size_mb : 128 , ", AllocatorSettings(max_split_size=128 * MIB)),
        (
            "garbage_collection_threshold:0.8,max_split_size_mb:512,max_non_split_rounding_mb:64",
            AllocatorSettings(
                garbage_collection_threshold=0.8, max_split_size=512 * MIB, max_non_split_rounding=64 * MIB
            ),
        ),
        ("roundup_power2_divisions:8", AllocatorSettings(roundup_power2_divisions=8)),
        (
            "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",  # torch's own example
            AllocatorSettings(roundup_power2_divisions=(1,) * 9 + (2, 4) + (8,) * 5),
        ),
        ("roundup_power2_divisions:[1:4,>:4]", AllocatorSettings(roundup_power2_divisions=4)),
        ("pinned_use_background_threads:True,backend:native", AllocatorSettings()),
    ],
)
def test_texts(text: str, settings: AllocatorSettings) -> None:
    """What a text stands for, and that the text of the settings stands for the same."""
    assert parse_settings(text) == settings
    assert parse_settings(settings.text) == settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("backend:cudaMallocAsync", "another allocator"),
        ("expandable_segments", "key:value"),
        ("expandable_segments:true", "True or False"),
        ("max_split_size_mb:20", "above 20 MiB"),
        ("max_split_size_mb:large", "large"),
        ("roundup_power2_divisions:[0:4]", "at least 1 MiB"),
        ("roundup_power2_divisions:[a:4]", r"\[SIZE:N,>:N\]"),
        ("roundup_power2_divisions:3", "power of two"),
        ("garbage_collection_threshold:1.5", "between 0 and 1"),
        ("garbage_collection_threshold:nan", "between 0 and 1"),
        ("max_split_size_mb:[", "key:value"),
    ],
)
def test_wrong_texts(text: str, said: str) -> None:
    """A text that torch would not take, or that asks for another allocator, is refused with the reason."""
    with pytest.raises(ConfigError, match=said):
        parse_settings(text)


def test_roundup_differs_by_size() -> None:
    """Each power of two from 1 MiB to 64 GiB has its own number of steps."""
    found = parse_settings("roundup_power2_divisions:[1:2,4:0]")
    assert found.divisions == (2, 0, 0) + (0,) * (INTERVALS - 3)


@pytest.mark.parametrize(
    ("version", "variable"),
    [
        ("2.6.0+cu124", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.9.1", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.10.0", "PYTORCH_ALLOC_CONF"),
        ("2.15.0a0+git", "PYTORCH_ALLOC_CONF"),
        ("3.0", "PYTORCH_ALLOC_CONF"),
        ("", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_the_variable_of_a_version(version: str, variable: str) -> None:
    """Before 2.10 torch reads the old name only."""
    assert variable_for(version) == variable
