"""What a row holds under a key, and how a bad one is named."""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from peergrad.prompts.files import Row


class BadRow(ValueError):
    """A row that cannot be used. ``kind`` is equal for rows with the same mistake."""

    def __init__(self, key: str, value: object, rule: str, remedy: str) -> None:
        super().__init__(f"{key} = {value!r}: {rule}; {remedy}")
        self.kind = (key, remedy)
        self._parts = (key, value, rule, remedy)

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, object, str, str]]:
        return BadRow, self._parts  # as every error, it may travel between processes

    def with_more(self, count: int, at_least: bool) -> "BadRow":
        """The same, with the number of further rows of its kind."""
        key, value, rule, remedy = self._parts
        more = f"{'at least ' if at_least else ''}{count} more like it"
        return BadRow(key, value, f"{rule} ({more})", remedy)


@dataclass(frozen=True)
class Key:
    """A column, or with dots a value inside of one.

    Example:
        >>> Key("data.answer_key", "reward_model.ground_truth").of(row)
        '18'
    """

    option: str
    name: str

    def of(self, row: Row) -> Any:
        """The value; a column of this very name goes first. Raises BadRow if there is none."""
        columns = row.columns
        if self.name in columns:
            return columns[self.name]
        value: Any = columns
        outer = ""
        for part in self.name.split(".") if "." in self.name else [self.name]:
            if not isinstance(value, dict) or part not in value:
                raise self._absent(row, value, part, outer)
            value, outer = value[part], f"{outer}.{part}" if outer else part
        return value

    def _absent(self, row: Row, value: Any, part: str, outer: str) -> BadRow:
        remedy = "name one that every row has"
        has = value if isinstance(value, dict) else {}
        known = ", ".join(map(repr, list(has)[:20])) or "none"
        rule = f"{row.where} has no such column, only {known}"
        if outer and isinstance(value, dict):
            rule = f"{row.where} has no {part!r} in {outer!r}, only {known}"
        elif outer:
            rule = f"{row.where} holds {shown(value)} in {outer!r}, which has no {part!r}"
        return self.refusal(rule, remedy)

    def refusal(self, rule: str, remedy: str) -> BadRow:
        return BadRow(self.option, self.name, rule, remedy)


def shown(value: Any) -> str:
    """A value as an error names it: its type where that is not plain to see."""
    if value is None or isinstance(value, str | int | float | list | dict):
        return f"{value!r:.60}"
    return f"{type(value).__name__} {value!r:.60}"


def answer_text(key: Key, row: Row) -> str:
    """The right answer as text: that of a number is the shortest exact one, without an exponent.

    18.0 becomes ``18``, 1e-05 becomes ``0.00001``. Raises BadRow for anything but text and numbers.
    """
    value = key.of(row)
    if isinstance(value, str):
        return require_text(key, row, value)
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not number or not (isinstance(value, int) or Decimal(value).is_finite()):
        raise key.refusal(
            f"{row.where} must hold text or a number there, not {shown(value)}",
            "correct it, or store it as the text that it is to be compared with",
        )
    exact = Decimal(repr(value)) if isinstance(value, float) else value
    return str(int(exact)) if exact == int(exact) else f"{exact:f}".rstrip("0")


def require_text(key: Key, row: Row, text: str, what: str = "") -> str:
    """``text``, which can be written down and sent. Raises BadRow for half of a surrogate pair, as
    an emoji cut in two leaves it, and for a NUL character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        rule = f"{row.where} holds {half}{what}, half of a surrogate pair, which is not UTF-8"
        raise key.refusal(rule, "correct it: a character was cut in two") from error
    if "\0" in text:
        rule = f"{row.where} holds a NUL character{what}, which no text has"
        raise key.refusal(rule, "correct it: the data is damaged or in another encoding")
    return text
