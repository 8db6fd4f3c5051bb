"""What was probably meant by a key, an option or a value that does not exist.

By meaning first (``synonyms``), then by the last name of a key, then by its letters and its words.
A hint that may be wrong is worse than none: far-off names get none, and never more than three.
"""

import re
from collections.abc import Collection, Iterator

from peergrad.running.keys import groups, is_section, keys
from peergrad.running.synonyms import ABSENT, MEANT, VALUES

MOST = 3
ANYWHERE = "--cfg prints every key"
ABROAD = "docs/migrating.md says what stands here for options of other trainers"
# Names that say nothing without their section.
BARE = {"name", "path", "source", "kind", "mode", "every", "data", "count", "args", "system"}


def unknown_key(key: str, value: str = "") -> str:
    """The line for a ``key`` that does not exist, set to ``value`` (its text, if known)."""
    section = named_section(key)
    where = f" in {section}" if section else ""
    return f"{key}: there is no such key{where}; {remedy(key, value)}"


def remedy(key: str, value: str = "") -> str:
    """What to do about an unknown key: "did you mean ...?", or where to look."""
    found = meant(key, value)
    if found:
        return f"did you mean {' or '.join(found)}?"
    return ABROAD if _absent(key, value) else ANYWHERE


def unknown_option(group: str, option: str) -> str:
    """The line for an ``option`` that ``group`` does not have."""
    options = groups()[group]
    found = _synonyms(f"{group}={plain(option)}") or [
        f"{group}={name}" for name in likeliest(option.removesuffix(".yaml"), options)
    ]
    choose = f"did you mean {' or '.join(found)}?" if found else "choose one of them"
    return f"{group} = {option!r}: must be one of {', '.join(options)}; {choose}"


def likeliest(value: str, names: Collection[str]) -> list[str]:
    """The ``names`` that a mistyped ``value`` may stand for."""
    word = plain(value)
    same = [name for name in names if plain(name) == word]
    synonym = [VALUES[word]] if VALUES.get(word) in names else []
    begins = [name for name in names if len(word) > 2 and plain(name).startswith(word)]
    return (same or synonym or begins or _nearest(word, list(names)))[:MOST]


def meant(key: str, value: str = "") -> list[str]:
    """At most three phrases that name what ``key`` (set to ``value``) probably means."""
    for found in _attempts(plain(key), plain(value)):
        if 0 < len(found) <= MOST:
            return found
    return []


def named_section(key: str) -> str:
    """The longest beginning of ``key`` that is a section, or ""."""
    return next((start for start in _starts(key) if is_section(start)), "")


def plain(text: str) -> str:
    """Without dashes, slashes and capitals."""
    return text.strip().lstrip("-+~").replace("-", "_").replace("/", ".").lower()


def _attempts(key: str, value: str) -> Iterator[list[str]]:
    """From the surest guess to the vaguest."""
    section, leaf = named_section(key), key.rpartition(".")[2]
    everything = list(dict.fromkeys([*keys(), *groups()]))
    inside = [known for known in everything if section and known.startswith(f"{section}.")]
    if _absent(key, value, exact=True):
        return
    yield [start for start in _starts(key) if start in keys() and not is_section(start)]
    for suffix in _suffixes(key):
        if "." in suffix:
            yield _synonyms(f"{suffix}={value}") or _synonyms(suffix)
    if inside:
        yield _ending(key.removeprefix(f"{section}."), inside)
        own = _synonyms(f"{leaf}={value}") or _synonyms(leaf)
        yield [phrase for phrase in own if phrase.startswith(f"{section}.")]
        yield _nearest(leaf, inside)
    if not (inside and leaf in BARE):
        yield _ending(key, everything)
    if "." not in section:  # who names a subsection knows where the key belongs
        yield _synonyms(f"{leaf}={value}") or _synonyms(leaf)
    if _absent(key, value):
        return
    if inside:
        yield _by_words(leaf, inside)
    if not (inside and leaf in BARE):
        yield _nearest(leaf, everything, sure=True)
        yield _by_words(leaf, everything)


def _starts(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def _suffixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[n:]) for n in range(len(parts))]


def _synonyms(name: str) -> list[str]:
    return MEANT.get(name, [])


def _absent(key: str, value: str, exact: bool = False) -> bool:
    """Whether another trainer's option is known to have no counterpart here."""
    names = [f"{suffix}={plain(value)}" for suffix in _suffixes(plain(key))]
    return any(name in ABSENT for name in names + ([] if exact else _suffixes(plain(key))))


def _ending(key: str, known: list[str]) -> list[str]:
    """The known keys with the longest common ending; of several, the one in a like-named place."""
    for suffix in _suffixes(key):
        found = [k for k in known if k == suffix or k.endswith(f".{suffix}")]
        if found:
            alike = [k for k in found if distance(k, key) <= 2]
            return alike if len(alike) == 1 else found
    return []


def _nearest(word: str, known: list[str], sure: bool = False) -> list[str]:
    """The known keys whose last name is the fewest typing errors away; ``sure``: one or two."""
    if sure:
        limit = 0 if len(word) < 3 else 1 if len(word) < 7 else 2
    else:
        limit = 1 if len(word) < 5 else 2 if len(word) < 9 else 3
    names = {k: k.rpartition(".")[2].lower() for k in known}
    near = {k: name for k, name in names.items() if abs(len(name) - len(word)) <= limit}
    away = {k: distance(word, name) for k, name in near.items()}
    least = min(away.values(), default=limit + 1)
    return [k for k, d in away.items() if d == least] if least <= limit else []


def _by_words(leaf: str, known: list[str]) -> list[str]:
    """The known keys that hold every word of ``leaf``, those with the fewest others."""
    words = [word for word in leaf.split("_") if word]
    scores = {}
    for key in known:
        own = re.split(r"[._]", key)
        if words and all(any(_alike(word, other) for other in own) for word in words):
            names = key.rpartition(".")[2].split("_")
            scores[key] = sum(not any(_alike(word, other) for word in words) for other in names)
    least = min(scores.values(), default=0)
    return [key for key, score in scores.items() if score == least]


def _alike(word: str, other: str) -> bool:
    if min(len(word), len(other)) < 3:
        return word == other
    begins = word.startswith(other) or other.startswith(word)
    return begins or (abs(len(word) - len(other)) < 2 and distance(word, other) == 1)


def distance(one: str, other: str) -> int:
    """Typing errors between two words: letters put in, left out, replaced, or swapped with the
    next."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == other[j - 2] and one[i - 2] == b:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
