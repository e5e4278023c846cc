"""Regular expressions of strangers, searched in bounded time.

A workflow or a file may hold any pattern, and Python's own engine needs longer than anybody waits
for some of a few characters. Here a pattern becomes a finite automaton (Thompson 1968), which is in
all of its states at once and so reads a name from left to right, once. What no such automaton can
do (to look ahead, to refer back) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

MOST_CHARACTERS = 500
_MOST_STATES = 2000
_MOST_DEPTH = 20  # of groups in groups
_MOST_WORK = 500_000  # looks at a state, for all names together; the presets take a thousandth
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|[^0-9A-Za-z]|[abfnrtvdDsSwWABZ])", re.DOTALL)
_COUNT = re.compile(r"\{(?!\})([0-9]*)(,?)([0-9]*)\}")
_PLACES = {"^": r"\A", "$": r"\Z"}  # names are of one line
_FOUND = -1
_ALLOWED = (
    "; letters, ., [classes], (groups), |, *, +, ?, {m,n}, ^, $ and \\b may be used, such as "
    "'attn1.*to_q'"
)

# Where the last character lies: at the start there is none, else it is of a word or not.
_START, _WORD, _OTHER = range(3)
# Builds the part of the automaton that leads to a state, and gives its first state.
_Part = Callable[[int], int]


class PatternError(ValueError):
    """A pattern cannot be used; the message goes on after its name and holds the fix."""


class Pattern:
    """A regular expression. Raises PatternError where it is none or goes beyond what is allowed."""

    def __init__(self, text: str):
        if len(text) > MOST_CHARACTERS:
            raise PatternError(
                f"has {len(text)} characters; {MOST_CHARACTERS} are allowed: shorten it"
            )
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise PatternError(f"is not a regular expression: {error}") from error
        self._test: list[Callable[[str], bool] | None] = [None]  # of a character; 0 is the end
        self._place: list[str] = [""]  # what must hold where no character is read
        self._next: list[tuple[int, ...]] = [()]
        self._first = _Parser(self, text).whole()(0)
        self._sets: list[tuple[frozenset[int], int]] = [(frozenset(), _START)]
        self._numbers = {self._sets[0]: 0}
        self._moves: dict[tuple[int, str], int] = {}
        self._work = 0

    def search(self, name: str) -> bool:
        """Whether it is found anywhere in ``name``, as :func:`re.search` does in one line.

        Raises PatternError when all names so far took too long.
        """
        now = 0
        for place in range(len(name) + 1):
            char = name[place : place + 1]  # empty at the end
            move = self._moves.get((now, char))
            if move is None:
                move = self._moves[now, char] = self._move(now, char)
            if move == _FOUND:
                return True
            now = move
        return False

    def state(self, test: Callable[[str], bool] | None, place: str, *after: int) -> int:
        """One more state of the automaton."""
        if len(self._next) >= _MOST_STATES:
            raise PatternError(
                f"grows beyond {_MOST_STATES} states; use smaller numbers in braces, or * and +"
            )
        self._test.append(test)
        self._place.append(place)
        self._next.append(after)
        return len(self._next) - 1

    def close(self, state: int, *after: int) -> None:
        """Let a state of a loop lead on, which is made before its body."""
        self._next[state] = after

    def _move(self, number: int, char: str) -> int:
        """The set of states behind ``char``, by its number; _FOUND where the end is reached."""
        states, before = self._sets[number]
        behind = _kind(char)
        left, seen = [self._first, *states], set[int]()
        reached = set[int]()
        while left:
            state = left.pop()
            if state in seen:
                continue
            seen.add(state)
            if state == 0:
                return _FOUND
            test, after = self._test[state], self._next[state]
            if test is not None:
                if char and test(char):
                    reached.update(after)
            elif _holds(self._place[state], before, behind, not char):
                left += after
        self._work += len(seen) + 1
        if self._work > _MOST_WORK:
            raise PatternError("takes too long on this model's names; make it simpler")
        found = (frozenset(reached), behind)
        if found not in self._numbers:
            self._numbers[found] = len(self._sets)
            self._sets.append(found)
        return self._numbers[found]


class _Parser:
    """Reads a pattern that Python takes for one, and refuses what no automaton can do."""

    def __init__(self, pattern: Pattern, text: str):
        self.pattern, self.text, self.at, self.depth = pattern, text, 0, 0

    def whole(self) -> _Part:
        branches = [self._branch()]
        while self._take("|"):
            branches.append(self._branch())
        if len(branches) == 1:
            return branches[0]
        return lambda end: self.pattern.state(None, "", *(branch(end) for branch in branches))

    def _branch(self) -> _Part:
        parts: list[_Part] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self._repeated(self._one()))

        def build(end: int) -> int:
            for part in reversed(parts):
                end = part(end)
            return end

        return build

    def _one(self) -> _Part:
        char = self.text[self.at]
        if char == "(":
            return self._group()
        if char == "[":
            return self._character(self._read(_CLASS))
        if char == "\\":
            escape = self._read(_ESCAPE)
            return self._at_place(escape) if escape[1] in "ABZb" else self._character(escape)
        self.at += 1
        if char in _PLACES:
            return self._at_place(_PLACES[char])
        return self._character("." if char == "." else re.escape(char))

    def _group(self) -> _Part:
        self.at += 1
        if self._take("?") and not self._take(":"):
            raise self._refusal(f"(?{self.text[self.at : self.at + 1]}")
        self.depth += 1
        if self.depth > _MOST_DEPTH:
            raise PatternError(f"has more than {_MOST_DEPTH} groups in each other; make it simpler")
        inside = self.whole()
        self.depth -= 1
        self._take(")")
        return inside

    def _repeated(self, part: _Part) -> _Part:
        count = _COUNT.match(self.text, self.at)
        if count is not None:
            self.at = count.end()
            least = int(count[1] or 0)
            most = (int(count[3]) if count[3] else None) if count[2] else least
        elif sign := next(filter(self._take, "*+?"), ""):
            least, most = int(sign == "+"), 1 if sign == "?" else None
        else:
            return part
        self._take("?")  # the shortest first: found all the same
        if self._take("+"):
            raise self._refusal("a + behind a repetition")
        return lambda end: self._times(part, least, most, end)

    def _times(self, part: _Part, least: int, most: int | None, end: int) -> int:
        state = self.pattern.state
        first = end
        if most is None:
            first = state(None, "")
            self.pattern.close(first, part(first), end)
        else:
            for _ in range(most - least):
                first = state(None, "", part(first), end)
        for _ in range(least):
            first = state(None, "", part(first))  # also of nothing: what is built is counted
        return first

    def _character(self, text: str) -> _Part:
        matches = re.compile(text).fullmatch
        test = cache(lambda char: matches(char) is not None)
        return lambda end: self.pattern.state(test, "", end)

    def _at_place(self, place: str) -> _Part:
        return lambda end: self.pattern.state(None, place, end)

    def _read(self, kind: re.Pattern[str]) -> str:
        found = kind.match(self.text, self.at)
        if found is None:
            raise self._refusal(self.text[self.at : self.at + 2])
        self.at = found.end()
        return found[0]

    def _take(self, char: str) -> bool:
        taken = self.text.startswith(char, self.at)
        self.at += taken
        return taken

    def _refusal(self, what: str) -> PatternError:
        return PatternError(f"uses {what}, which is not allowed{_ALLOWED}")


@cache
def _kind(char: str) -> int:
    return _WORD if re.fullmatch(r"\w", char) else _OTHER


def _holds(place: str, before: int, behind: int, at_end: bool) -> bool:
    if place == r"\A":
        return before == _START
    if place == r"\Z":
        return at_end
    if place in (r"\b", r"\B"):
        return ((before == _WORD) != (behind == _WORD)) == (place == r"\b")
    return True
