r"""Numbers as people, spreadsheets and models write them, read exactly.

Currency, units, percent signs, Markdown and LaTeX around a number are ignored: ``50%`` is 50. What
is left must be the number itself: ``\sqrt{16}``, ``2^3`` and ``\pm 5`` are expressions, and no
numbers here. All patterns repeat possessively or within bounds, which keeps them linear whatever a
model writes.
"""

import unicodedata
from fractions import Fraction

import regex as re  # Python's own, before 3.11.5, matches possessive groups wrongly, without a word

MAX_DIGITS = 40  # Longer numbers are noise, and slow to convert.

# No number: digits inside a word (x2), an ordinal (1st), a power (2^3), another base (0x1F, 101_2),
# an exponent without its number, or grouped wrongly (1,23 is two numbers).
_NUMBER = re.compile(
    r"""(?=[-\u2212\u2013\\$\u20ac\u00a3\u00a5\u20b9.0-9])  # thrice as fast
        (?:(?<![\w)}])(?P<minus>[-\u2212\u2013]))?+
        (?:\\?[$\u20ac\u00a3\u00a5\u20b9][ ]?(?P<minus_after>[-\u2212\u2013])?+)?+
        (?<![\w^\u00b1]) (?<!\^\{) (?<![0-9]e[-+\u2212])
        (?:(?P<whole>[0-9]{1,6}+)[ ]{1,3}+(?=[0-9]{1,6}+[ ]?/[ ]?[0-9]{1,6}+(?![0-9])))?+
        (?P<value>
            (?>[0-9]{1,3}(?:,[0-9]{3}){1,9}+(?![0-9]) | [0-9]++) (?:\.[0-9]++)?+
          | (?<!\.)\.[0-9]++
        )
        (?:e(?P<exponent>[-+\u2212]?0{0,9}+[0-9]{0,2}+(?<=[0-9]))(?![0-9]|\.[0-9]))?+
        (?:[ ]?/[ ]?(?P<denominator>[0-9]++))?+
        (?!e[-+\u2212]?[0-9] | x[0-9a-f] | _[0-9]
          | \^ | [\u00b2\u00b3\u00b9\u2070-\u2079] | (?:st|nd|rd|th)\b)""",
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)

_FULL_WIDTH = {0xFEE0 + ord(sign): sign for sign in "0123456789-$%,./"} | {0x2044: "/"}
_VULGAR = re.compile("(?P<whole>[0-9])?(?P<part>[\u00bc-\u00be\u2150-\u215e])")  # a half, ...
_UNDERSCORES = re.compile(r"(?<![A-Za-z0-9}])_++|_++(?![A-Za-z0-9{\\])", re.ASCII)  # Markdown's
_SCRIPT = r"\{[^{}]{0,12}+\}|[-+]?[0-9]{1,2}+|[A-Za-z]"
_UNIT = r"[kcmd]?m|ft|feet|in|inch|inches|yd|yards?|mi|miles?|h|hr|s|sec|met(?:er|re)s?|units?"
_TEN = r"10\^(?:\{(?P<braced>[-+\u2212]?[0-9]{1,2})\}|(?P<bare>[-+\u2212]?[0-9]{1,2}))"
# regex lets a name stand in both alternatives.
_POWER = re.compile(rf"(?<=[0-9])[ ]?(?:\\times|\\cdot|[\u00d7*])[ ]?{_TEN}|(?<![\w.^]){_TEN}")
_STYLE = r"\\(?:text|mathrm|mathbf|mathit|mathsf|mbox|hbox|bold|boldsymbol|bm|emph)[a-z]{0,6}+"
_WORDS = rf"{_STYLE}\{{[^{{}}0-9]{{0,24}}+\}}"

# What LaTeX adds to a number, in this order; the text of a group stays.
_LATEX = [
    (re.compile(r"\{(,)\}|\\[,!]"), r"\1"),  # 1{,}234, 1\,234 and 1,\!234
    (re.compile(r"\\[ ;:]|~|\\q?quad(?![a-z])"), " "),
    (re.compile(r"\^\{?\\(?:circ|degree)\}?"), ""),
    (re.compile(rf"\\[dt]?frac\{{{_WORDS}\}}\{{{_WORDS}\}}"), " "),  # \frac{\text{km}}{\text{h}}
    (re.compile(r"\\(?:alpha|beta|gamma|lambda|mu|phi|theta|angle)(?=[\s_A-Z]{0,5}=)"), ""),
    (re.compile(r"(?<=[A-Za-z}])_(?:\{[^{}]*+\}|[0-9A-Za-z])"), ""),  # x_{1}
]
_GROUP = re.compile(rf"{_STYLE}[ ]?\{{([^{{}}]*+)\}}(?:[\^_](?:{_SCRIPT}))?+")  # \text{ m}^2
_AREA = re.compile(rf"(?<![A-Za-z\\])({_UNIT})\^(?:{_SCRIPT})")  # m^2, not x^2
_FRACTION = re.compile(
    r"(?P<whole>[0-9])?\\[dtc]?frac[ ]?"
    r"(?:\{(?P<top>[^{}]*+)\}|(?P<top_digit>[0-9]))[ ]?"
    r"(?:\{(?P<bottom>[^{}]*+)\}|(?P<bottom_digit>[0-9]))"
)
_PLAIN = re.compile(r"[-+\u2212]?[0-9][0-9.,]*+")
_COMMAND = re.compile(r"\\([A-Za-z]++)")
_HARMLESS = {
    *("left", "right", "big", "Big", "displaystyle", "textstyle", "approx", "therefore"),
    *("large", "Large", "huge", "Huge", "underline", "color", "dots", "ldots"),
    *("degree", "circ", "textdegree", "euro", "pounds", "textdollar", "texteuro", "percent"),
}


def numbers_in(text: str) -> list[re.Match[str]]:
    """All numbers of ``text``, in order; ``value_of`` tells their values."""
    return list(_NUMBER.finditer(_undecorated(text)))


def only_number(text: str) -> Fraction | None:
    r"""The value of ``text`` if it is one number, decorated or not.

    Example:
        >>> only_number(r"x_{1} = \$1{,}234.50\text{ per m}^2"), only_number("17 or 18")
        (Fraction(2469, 2), None)
    """
    text = re.sub(r"^\s*+[-\u2212]\s++(?=[$\\.0-9])", "-", _undecorated(text))
    if "^" in text or "\u00b1" in text or set(_COMMAND.findall(text)) - _HARMLESS:
        return None
    numbers = list(_NUMBER.finditer(text))
    return value_of(numbers[0]) if len(numbers) == 1 else None


def starts_with_number(line: str) -> bool:
    """Whether a number comes before any word of ``line``."""
    line = _undecorated(line)
    number = _NUMBER.search(line)
    return number is not None and not any(map(str.isalpha, line[: number.start()]))


def value_of(number: re.Match[str]) -> Fraction | None:
    """None for what no answer is: 41 digits, a denominator of 0, 3 4/2."""
    denominator, whole = int(number["denominator"] or "1"), number["whole"]
    if len(number[0]) > MAX_DIGITS or not denominator:
        return None
    value = Fraction(number["value"].replace(",", ""))
    if number["exponent"]:
        value *= Fraction(10) ** int(number["exponent"].replace("\u2212", "-"))
    value /= denominator
    if whole is not None:
        if value >= 1:
            return None
        value += int(whole)
    return -value if number["minus"] or number["minus_after"] else value


def _undecorated(text: str) -> str:
    """``text`` with every number in the form that the pattern knows, and units without digits."""
    if not text.isascii():
        text = _VULGAR.sub(_vulgar, text.translate(_FULL_WIDTH)).replace("\u00b0", "")
    if "_" in text:
        text = _UNDERSCORES.sub("", text)
    if "\\" in text or "_" in text or "~" in text or "{" in text:
        for pattern, replacement in _LATEX:
            text = pattern.sub(replacement, text)
        text = _FRACTION.sub(_fraction, text)
        text = _GROUP.sub(r" \1 ", _GROUP.sub(r" \1 ", text))
    if "^" in text:
        text = _AREA.sub(r"\1", _POWER.sub(_power, text))
    return text


def _vulgar(number: re.Match[str]) -> str:
    part = Fraction(unicodedata.numeric(number["part"])).limit_denominator(10)
    return f"{number['whole'] or ''} {part}"


def _power(ten: re.Match[str]) -> str:
    one = "" if ten.start() and ten.string[ten.start() - 1].isdigit() else "1"
    return f"{one}e{ten['braced'] or ten['bare']}"


def _fraction(latex: re.Match[str]) -> str:
    r"""``\frac{1}{2}`` as 1/2, ``3\frac{1}{2}`` as 3 1/2; nothing of one that is no number."""
    top = (latex["top"] or latex["top_digit"] or "").strip()
    bottom = (latex["bottom"] or latex["bottom_digit"] or "").strip()
    if not (_PLAIN.fullmatch(top) and _PLAIN.fullmatch(bottom)):
        return r" \frac "
    if bottom[0] in "-\u2212":
        top, bottom = f"-{top}", bottom[1:]
    before = latex.string[latex.start() - 1 : latex.start()]
    space = " " if latex["whole"] or before.isalpha() else ""
    return f"{latex['whole'] or ''}{space}{top}/{bottom}"
