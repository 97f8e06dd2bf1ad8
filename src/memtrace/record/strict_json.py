"""Reading JSON that somebody else may have written: every mistake becomes one error that names its place."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from memtrace.errors import LogFormatError

_MAX_INTEGER = 2**63 - 1
_MAX_NUMBER = 1e300

_Word = TypeVar("_Word", bound=StrEnum)
_Value = TypeVar("_Value")


def parse_json(text: str | bytes, source: str) -> Any:
    """Returns the value that a JSON text stands for.

    Args:
        text: the text; bytes are UTF-8.
        source: file and line, for the message.

    Raises:
        LogFormatError: the text is not JSON (RFC 8259, so NaN is not), or nested or long in digits beyond reason.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # wrong JSON and wrong UTF-8 are ValueErrors
        raise LogFormatError(f"{source}: must be one JSON value, but {error}") from error


def read_document(path: str | os.PathLike[str], what: str, schema: str) -> Fields | None:
    """Returns the fields of a JSON file that says which schema it has; None where there is no such file.

    Args:
        path: the file.
        what: what it is, for the message.
        schema: what its field `schema` must say.

    Raises:
        LogFormatError: the file cannot be read, or has not that schema.
    """
    source = str(path)
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LogFormatError(f"{source}: the {what} cannot be read: {error.strerror or error}") from error
    found = Fields.of(parse_json(text, source), source)
    found.schema(schema)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object whose fields are asked for by type.

    Every method raises LogFormatError, naming source and field, where the field has not that type. Fields that nobody
    asks for are ignored.
    """

    values: Mapping[str, Any]
    source: str
    """File and line, for messages."""
    path: str = ""
    """Where the object stands in its document, such as `moments.peak.`."""

    @classmethod
    def of(cls, value: Any, source: str, path: str = "") -> Fields:
        """Returns the fields of a value that must be an object."""
        if not isinstance(value, dict):
            place = path.removesuffix(".") or "the document"
            raise LogFormatError(f"{source}: {place} must be an object, got {reprlib.repr(value)}")
        return cls(value, source, path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def schema(self, expected: str) -> None:
        """Checks what the document says it is."""
        if self.values.get("schema") != expected:
            self._wrong("schema", repr(expected))

    def integer(self, name: str) -> int:
        """Returns an integer from 0 to 2**63 - 1."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_INTEGER:
            self._wrong(name, "an integer from 0 to 2**63 - 1")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """Returns an array of such integers."""
        return self._items(name, Fields.integer)

    def number(self, name: str) -> float:
        """Returns a number of which a float can hold the size."""
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_MAX_NUMBER <= value <= _MAX_NUMBER:
            self._wrong(name, "a number")
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """Returns an array of such numbers."""
        return self._items(name, Fields.number)

    def boolean(self, name: str) -> bool:
        """Returns true or false."""
        value = self.values.get(name)
        if not isinstance(value, bool):
            self._wrong(name, "true or false")
        return value

    def text(self, name: str) -> str:
        """Returns a text that can be written as UTF-8."""
        value = self.values.get(name)
        if not isinstance(value, str) or not (value.isascii() or _encodable(value)):
            self._wrong(name, "a text")
        return value

    def word(self, name: str, vocabulary: type[_Word]) -> _Word:
        """Returns the word of a vocabulary that a text stands for."""
        text = self.text(name)
        try:
            return vocabulary(text)
        except ValueError:
            self._wrong(name, f"one of {', '.join(vocabulary)}")

    def words(self, vocabulary: type[_Word]) -> list[_Word]:
        """Returns the field names, which must be words of a vocabulary."""
        try:
            return [vocabulary(name) for name in self.values]
        except ValueError as error:
            place = self.path.removesuffix(".")
            raise LogFormatError(
                f"{self.source}: each field of {place} must be one of {', '.join(vocabulary)}"
            ) from error

    def by_word(self, vocabulary: type[_Word]) -> dict[_Word, Fields]:
        """Returns the objects of an object whose field names are words of a vocabulary."""
        return {word: self.object(word) for word in self.words(vocabulary)}

    def array(self, name: str) -> list[Any]:
        """Returns an array."""
        value = self.values.get(name)
        if not isinstance(value, list):
            self._wrong(name, "an array")
        return value

    def object(self, name: str) -> Fields:
        """Returns the fields of an object."""
        return Fields.of(self.values.get(name), self.source, f"{self.path}{name}.")

    def objects(self, name: str) -> list[Fields]:
        """Returns the fields of each object of an array."""
        items = enumerate(self.array(name))
        return [Fields.of(item, self.source, f"{self.path}{name}[{at}].") for at, item in items]

    def optional(self, name: str, kind: Callable[[Fields, str], _Value]) -> _Value | None:
        """Returns what `kind`, one of the methods above, returns for the field; None where it is null or absent."""
        return None if self.values.get(name) is None else kind(self, name)

    def _items(self, name: str, kind: Callable[[Fields, str], _Value]) -> tuple[_Value, ...]:
        items = Fields({f"{name}[{at}]": item for at, item in enumerate(self.array(name))}, self.source, self.path)
        return tuple(kind(items, at) for at in items)

    def _wrong(self, name: str, expected: str) -> NoReturn:
        got = reprlib.repr(self.values[name]) if name in self.values else "nothing"
        raise LogFormatError(f"{self.source}: {self.path}{name} must be {expected}, got {got}")


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
