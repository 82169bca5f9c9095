"""Name patterns: Python's regular expressions, matched in time that grows with pattern and name, whatever they are.

Patterns come with adapter files. Python's own matcher backtracks: ``([a-z.]+)+!`` on a long name never returns and lets
no other thread run. Here Python parses a pattern and matches its single characters, and a machine follows them through
a name, taking each pair of an instruction and a position once. The result is Python's: the same match, and the same
first group. Only where a part that may be empty is repeated, ``(^|a)*``, may Python's match be shorter than the one
found here.

No bound on quantifiers would do instead: the patterns that tools write into ``target_modules`` have four ``.*?`` with
alternatives between them, and ``(a|a)(a|a)...`` has none. RE2 lacks ``(?!...)``, which people use.

The parse tree is private to Python's standard library (``re._parser``, ``re._compiler``, ``re._constants``, in 3.11 to
3.14): this file can go when ``re`` itself has a matcher without backtracking.
"""

from __future__ import annotations

import re
import re._compiler as compiler  # type: ignore[import-not-found]
import re._constants as sre  # type: ignore[import-not-found]
import re._parser as parser  # type: ignore[import-not-found]
from functools import lru_cache
from typing import Any

__all__ = ["NamePattern", "check_ending", "name_pattern", "pattern_matches_ending"]

_LONGEST = 1000
"""Characters of a pattern, instructions that it may become, and characters of a name that it is tried on."""

_FLAGS = re.IGNORECASE | re.DOTALL | re.VERBOSE | re.UNICODE


class NamePattern:
    """A pattern, ready to be matched.

    Args:
        text: the regular expression.

    Raises:
        ValueError: the text is no regular expression, is too long, or refers back to its own groups, which cannot be
            matched in bounded time.
    """

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST:
            raise ValueError(f"{len(text)} characters, more than the {_LONGEST} that a pattern may have")
        self.text = text
        self._program: list[tuple[Any, ...]] = []
        try:
            parsed = parser.parse(text)
            if parsed.state.flags & ~_FLAGS:
                raise ValueError(f"{text!r} sets a flag other than i, s and x")
            self._compile(parsed, parsed.state.flags)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{text!r} is not a regular expression: {error}") from error
        self._emit("match")
        self.groups: int = parsed.state.groups - 1

    def fullmatch(self, name: str) -> bool:
        """Whether the whole name matches."""
        return self._run(name, 0, whole=True) is not None

    def match(self, name: str) -> bool:
        """Whether the start of the name matches."""
        return self._run(name, 0) is not None

    def find(self, name: str) -> str | None:
        """The first group of the first match in the name, or all of that match if the pattern has no group.

        Raises:
            ValueError: the name is too long.
        """
        failed = bytearray((len(name) + 1) * len(self._program))
        for start in range(len(name) + 1):
            found = self._run(name, start, seen=failed)
            if found is not None:
                begin, end = found[1:] if self.groups else (start, found[0])
                return "" if begin is None or end is None else name[begin:end]
        return None

    def _emit(self, *instruction: Any) -> int:
        if len(self._program) >= _LONGEST:
            raise ValueError(f"{self.text!r} repeats too much for a name pattern")
        self._program.append(instruction)
        return len(self._program) - 1

    def _compile(self, items: Any, flags: int, *, looking: bool = False) -> None:
        for operation, argument in items:
            if operation in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN, sre.AT):
                self._emit("one", _one(operation, argument, flags))
            elif operation is sre.SUBPATTERN:
                group, added, removed, inner = argument
                if looking and group is not None:
                    raise ValueError(f"{self.text!r}: a group inside of (?=...) or the like is not supported")
                if (added | removed) & ~_FLAGS:
                    raise ValueError(f"{self.text!r} sets a flag other than i, s and x")
                first = group == 1
                if first:
                    self._emit("begin")
                self._compile(inner, (flags | added) & ~removed, looking=looking)
                if first:
                    self._emit("end")
            elif operation is sre.BRANCH:
                self._branch(argument[1], flags, looking)
            elif operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
                least, most, inner = argument
                self._repeat(least, most, inner, flags, looking, greedy=operation is sre.MAX_REPEAT)
            elif operation in (sre.ASSERT, sre.ASSERT_NOT):
                direction, inner = argument
                self._look(direction, inner, flags, wanted=operation is sre.ASSERT)
            elif operation is sre.FAILURE:
                self._emit("fail")
            else:
                raise ValueError(f"{self.text!r} refers back to what it matched, which a name pattern may not")

    def _branch(self, alternatives: Any, flags: int, looking: bool) -> None:
        ends = []
        for number, alternative in enumerate(alternatives):
            last = number == len(alternatives) - 1
            split = None if last else self._emit("split")
            self._compile(alternative, flags, looking=looking)
            if split is not None:
                ends.append(self._emit("jump"))
                self._program[split] = ("split", split + 1, len(self._program))
        for end in ends:
            self._program[end] = ("jump", len(self._program))

    def _repeat(self, least: int, most: Any, inner: Any, flags: int, looking: bool, *, greedy: bool) -> None:
        for _ in range(least):
            self._compile(inner, flags, looking=looking)
        if most is sre.MAXREPEAT:
            split = self._emit("split")
            self._compile(inner, flags, looking=looking)
            self._emit("jump", split)
            self._set_split(split, greedy)
            return
        splits = []
        for _ in range(most - least):
            splits.append(self._emit("split"))
            self._compile(inner, flags, looking=looking)
        for split in splits:
            self._set_split(split, greedy)

    def _set_split(self, split: int, greedy: bool) -> None:
        inside, after = split + 1, len(self._program)
        self._program[split] = ("split", inside, after) if greedy else ("split", after, inside)

    def _look(self, direction: int, inner: Any, flags: int, *, wanted: bool) -> None:
        back = inner.getwidth()[0] if direction < 0 else 0
        place = self._emit("look")
        self._compile(inner, flags, looking=True)
        self._emit("match")
        self._program[place] = ("look", back, wanted, len(self._program))

    def _run(
        self, name: str, start: int, *, whole: bool = False, seen: bytearray | None = None, first: int = 0
    ) -> tuple[int, int | None, int | None] | None:
        """The first match in Python's order as (its end, begin and end of the first group).

        Args:
            name: to match.
            start: position of the match.
            whole: it has to end at the end of the name.
            seen: for each instruction and position whether it was tried before, without success.
            first: the instruction to begin with.
        """
        if len(name) > _LONGEST:
            raise ValueError(f"a name of {len(name)} characters, longer than the {_LONGEST} that a pattern is tried on")
        size = len(name) + 1
        if seen is None:
            seen = bytearray(size * len(self._program))
        stack: list[tuple[int, int, int | None, int | None]] = [(first, start, None, None)]
        while stack:
            place, position, begin, end = stack.pop()
            index = place * size + position
            if seen[index]:
                continue
            seen[index] = 1
            kind, *arguments = self._program[place]
            if kind == "one":
                if item := arguments[0].match(name, position):
                    stack.append((place + 1, item.end(), begin, end))
            elif kind == "split":
                preferred, other = arguments
                stack += [(other, position, begin, end), (preferred, position, begin, end)]
            elif kind == "jump":
                stack.append((arguments[0], position, begin, end))
            elif kind == "begin":
                stack.append((place + 1, position, position, end))
            elif kind == "end":
                stack.append((place + 1, position, begin, position))
            elif kind == "look":
                back, wanted, after = arguments
                at = position - back
                if (at >= 0 and self._run(name, at, first=place + 1) is not None) == wanted:
                    stack.append((after, position, begin, end))
            elif kind == "match" and (not whole or position == len(name)):
                return position, begin, end
        return None


def _one(operation: Any, argument: Any, flags: int) -> re.Pattern[str]:
    """Python's own pattern of one item that matches a character, or a place between two, and so never backtracks."""
    state = parser.State()
    state.flags = flags
    compiled: re.Pattern[str] = compiler.compile(parser.SubPattern(state, [(operation, argument)]))
    return compiled


@lru_cache(4096)
def name_pattern(text: str) -> NamePattern:
    """The pattern of this text, compiled once. Raises as :class:`NamePattern`."""
    return NamePattern(text)


@lru_cache(4096)
def _ending(text: str) -> re.Pattern[str] | NamePattern:
    name_pattern(text)  # a text such as "a)(b" is no pattern, though the line below would make one of it
    whole = rf"(?:.*\.)?(?:{text})$"
    # A module's name, also one from re.escape, as most are: on these Python's own matcher is fast and safe.
    return re.compile(whole) if _PLAIN.fullmatch(text) else name_pattern(whole)


_PLAIN = re.compile(r"(?:[A-Za-z0-9_.-]|\\[^A-Za-z0-9])*")


def check_ending(text: str) -> None:
    """Refuse what :func:`pattern_matches_ending` does not take, with its ValueError."""
    _ending(text)


@lru_cache(65536)
def pattern_matches_ending(text: str, name: str) -> bool:
    """Whether a pattern matches a name in full, or from a dot on, as PEFT's ``rank_pattern`` does.

    Raises:
        ValueError: as :class:`NamePattern`; also for a pattern that sets flags for all of itself.
    """
    return bool(_ending(text).match(name))
