"""The harm rules as they stand in patterns/*.yaml, read strictly: an error names the file, the rule and the field.

words.yaml holds groups of phrases, guards.yaml what makes a match harmless, every other file one category of rules.
patterns/README.md shows how to write one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from cai_experiment.constitution.principles import AXIS_WEIGHTS
from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.harm.phrases import Lexicon, PhraseError, Shape

PATTERNS = Path(__file__).with_name("patterns")
WORDS, GUARDS = "words.yaml", "guards.yaml"
WITHIN = 5  # words between two parts, unless a rule says otherwise
SIDES = ("before", "after", "sentence")
_FILE_KEYS = {"category", "axis", "title", "not_between", "rules"}
_SHAPE_KEYS = {"id", "reason", "parts", "within", "order", "present", "unless", "not_between", "examples"}
_RULE_KEYS = _SHAPE_KEYS | {"axis", "look_alikes", "unguarded"}
_GUARD_KEYS = _SHAPE_KEYS - {"present", "not_between"} | {"side", "reach", "inside", "cancelled_by"}


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: what it flags (`axis`, `category`), why, how its parts must stand, and texts that show it.

    Every example must be flagged by this rule, no look-alike may be flagged by any rule. `unguarded` names the guards
    that do not hold for it ("all": none does).
    """

    id: str
    axis: str
    category: str
    reason: str
    shape: Shape
    examples: tuple[str, ...]
    look_alikes: tuple[str, ...]
    unguarded: frozenset[str]


@dataclass(frozen=True, slots=True)
class Guard:
    """What makes a match harmless: a refusal, a warning, a question about prevention. Its examples are not flagged.

    `side`: the guard stands before or after the match, at most `reach` words away, or anywhere in the sentence;
    `inside`: it may also stand within the match, before its last part ("how can a shop *prevent* shoplifting").
    A phrase of `cancelled_by` later in the sentence takes the guard back ("avoid ... being caught").
    """

    id: str
    reason: str
    shape: Shape
    side: str
    reach: int
    inside: bool
    cancelled_by: frozenset[int]
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RuleBook:
    """All rules and guards of a folder, and the lexicon that finds their phrases."""

    rules: tuple[Rule, ...]
    guards: tuple[Guard, ...]
    lexicon: Lexicon


def load_rule_book(folder: Path = PATTERNS) -> RuleBook:
    """Read a folder of rules. Raises BadInputError (file, rule, what is wrong) for anything that cannot be used."""
    if not folder.is_dir():
        raise BadInputError(f"{folder} is no folder of harm rules", f"the shipped one is {PATTERNS.name}/")
    lexicon = Lexicon(_groups(folder / WORDS))
    guards = tuple(_guard(_Entry(folder / GUARDS, raw, lexicon)) for raw in _list(folder / GUARDS, "guards"))
    rules: list[Rule] = []
    for path in sorted(folder.glob("*.yaml")):
        if path.name not in (WORDS, GUARDS):
            rules += _category(path, lexicon, {guard.id for guard in guards})
    _check_unique(folder, [rule.id for rule in rules])
    _check_unique(folder, [guard.id for guard in guards])
    return RuleBook(tuple(rules), guards, lexicon)


def _category(path: Path, lexicon: Lexicon, guards: set[str]) -> list[Rule]:
    data = _mapping(path, _FILE_KEYS, ("category", "axis", "title", "rules"))
    shared: dict[str, Any] = {key: data[key] for key in ("not_between", "axis") if key in data}
    entries = [_Entry(path, raw, lexicon, shared) for raw in _list(path, "rules")]
    return [_rule(entry, str(data["category"]), guards) for entry in entries]


def _rule(entry: _Entry, category: str, guards: set[str]) -> Rule:
    entry.check_keys(_RULE_KEYS, ("id", "reason", "parts", "examples"))
    axis = str(entry.get("axis", ""))
    if axis not in AXIS_WEIGHTS:
        entry.fail(f"axis {axis!r} is none of {', '.join(AXIS_WEIGHTS)}")
    unguarded = frozenset(entry.texts("unguarded"))
    if unknown := unguarded - guards - {"all"}:
        entry.fail(f"unguarded: {GUARDS} has no guard {sorted(unknown)[0]!r}")
    examples, look_alikes = entry.texts("examples"), entry.texts("look_alikes")
    return Rule(entry.id, axis, category, str(entry.get("reason")), entry.shape(), examples, look_alikes, unguarded)


def _guard(entry: _Entry) -> Guard:
    entry.check_keys(_GUARD_KEYS, ("id", "reason", "parts", "side", "examples"))
    side = str(entry.get("side"))
    if side not in SIDES:
        entry.fail(f"side {side!r} is none of {', '.join(SIDES)}")
    inside = str(entry.get("inside", "no"))
    if inside not in ("yes", "no"):
        entry.fail(f"inside {inside!r} is neither yes nor no")
    return Guard(
        entry.id,
        str(entry.get("reason")),
        entry.shape(),
        side,
        entry.number("reach", WITHIN),
        inside == "yes",
        entry.slots("cancelled_by"),
        entry.texts("examples"),
    )


class _Entry:
    """One rule or guard of a file, with errors that name it. `shared` holds what its file says for all its rules."""

    def __init__(self, path: Path, raw: Any, lexicon: Lexicon, shared: Mapping[str, Any] | None = None) -> None:
        self._path, self._lexicon, self._shared = path, lexicon, shared or {}
        self.id = str(raw.get("id", "without id")) if isinstance(raw, dict) else repr(raw)
        if not isinstance(raw, dict):
            self.fail("is no mapping of fields")
        self._raw: dict[str, Any] = raw

    def fail(self, what: str) -> None:
        """Raise the error that names the file and this entry."""
        raise BadInputError(f"{self._path}: {self.id}: {what}", "mend that entry")

    def check_keys(self, allowed: set[str], needed: Sequence[str]) -> None:
        """Refuse fields that nobody reads, and the lack of one that is needed."""
        if unknown := set(self._raw) - allowed:
            self.fail(f"unknown field {sorted(map(str, unknown))[0]!r}; it may have {', '.join(sorted(allowed))}")
        for key in needed:
            if not self._raw.get(key):
                self.fail(f"has no {key}")

    def get(self, key: str, default: Any = None) -> Any:
        """A field: the entry's own, else the file's."""
        return self._raw.get(key, self._shared.get(key, default))

    def number(self, key: str, default: int) -> int:
        """A field that counts words."""
        value = str(self.get(key, default))
        if not value.isdecimal() or int(value) > 100:
            self.fail(f"{key} {value!r} is no number of words (0 to 100)")
        return int(value)

    def texts(self, key: str) -> tuple[str, ...]:
        """A field that lists texts."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(text, str) and text.strip() for text in value):
            self.fail(f"{key} must list texts")
        return tuple(value)

    def slots(self, key: str) -> frozenset[int]:
        """A field that lists phrases."""
        return self._slots(key, self.get(key, []))

    def shape(self) -> Shape:
        """How the entry's parts must stand."""
        parts, order = self._raw["parts"], self.get("order", "written")
        if not isinstance(parts, list) or not 1 <= len(parts) <= 4:
            self.fail("parts must list one to four lists of phrases")
        if order not in ("written", "any"):
            self.fail(f"order {order!r} is neither written nor any")
        slots = tuple(self._slots("parts", part) for part in parts)
        if not all(slots):
            self.fail("parts holds an empty part")
        return Shape(
            slots,
            self.number("within", WITHIN),
            order == "any",
            self.slots("not_between"),
            self.slots("present"),
            self.slots("unless"),
        )

    def _slots(self, key: str, phrases: Any) -> frozenset[int]:
        if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
            self.fail(f"{key} must list phrases")
        try:
            return self._lexicon.slots_of(phrases)
        except PhraseError as error:
            raise BadInputError(f"{self._path}: {self.id}: {key}: {error}", "mend that entry") from None


# ---------------------------------------------------------------- files


def _read(path: Path) -> Any:
    import yaml

    # Texts only, so that a phrase may be "false", "no" or "911". In C where it was built so: ten times faster.
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} cannot be read: {error}", "restore the file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise BadInputError(f"{place} is not YAML: {getattr(error, 'problem', error)}", "mend that line") from None


def _mapping(path: Path, allowed: set[str], needed: Sequence[str]) -> dict[str, Any]:
    data = _read(path)
    if not isinstance(data, dict):
        raise BadInputError(f"{path} holds no mapping", f"it needs {', '.join(needed)}")
    if unknown := {str(key) for key in data} - allowed:
        raise BadInputError(
            f"{path}: unknown field {sorted(unknown)[0]!r}", f"it may have {', '.join(sorted(allowed))}"
        )
    for key in needed:
        if not data.get(key):
            raise BadInputError(f"{path} has no {key}", f"it needs {', '.join(needed)}")
    return data


def _list(path: Path, key: str) -> list[Any]:
    data = _read(path)
    entries = data.get(key) if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise BadInputError(f"{path}: {key} must be a list of entries", "mend the file")
    return entries


def _groups(path: Path) -> dict[str, list[str]]:
    data = _read(path)
    if not isinstance(data, dict):
        raise BadInputError(f"{path} must map a group's name to its phrases", "mend the file")
    for name, phrases in data.items():
        if not isinstance(phrases, list) or not phrases or not all(isinstance(phrase, str) for phrase in phrases):
            raise BadInputError(f"{path}: group {name}: must list phrases", "mend that group")
    return {str(name): phrases for name, phrases in data.items()}


def _check_unique(folder: Path, ids: Sequence[str]) -> None:
    for id in ids:
        if ids.count(id) > 1:
            raise BadInputError(f"{folder}: two entries are called {id!r}", "give one another id")
