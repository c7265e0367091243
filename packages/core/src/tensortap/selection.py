"""Selection: which names, steps and ranks; decided before anything is copied.

    layers.*.attn.*/forward/*,!*/param/*      globs over whole names; `!` excludes
    layers.0.*,lm_head                        without `/`: whole modules, with all inside them
    *weight                                   begins with a star, no dot: names that end so, too
    re:layers\\.[0-3]\\..*                      `re:` starts a regular expression

`*` stands for any characters, dots and slashes included, `?` for one, `[…]` for one of a set.
A name is selected when some including pattern matches it (or there is none) and no excluding one.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass

from tensortap.errors import ConfigError, SelectionError

_ANY = "any_word"
"""A word that no pattern means in particular."""
_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


@dataclass(frozen=True, slots=True)
class _Pattern:
    text: str
    regexes: tuple[re.Pattern[str], ...]
    globs: tuple[tuple[str, ...], ...]
    """Each glob's parts (`*`, `?`, `[…]` or one character); none for a regular expression."""

    @classmethod
    def compile(cls, text: str) -> _Pattern:
        if not text.startswith("re:"):
            globs = _spelled_out(text)
            regexes = (re.compile(fnmatch.translate(glob)) for glob in globs)
            return cls(text, tuple(regexes), tuple(_tokens(glob) for glob in globs))
        try:
            return cls(text, (re.compile(text[3:] + r"\Z"),), ())
        except re.error as error:
            raise SelectionError(f"{text!r} is not a regular expression: {error}.") from error

    def matches(self, name: str) -> bool:
        return any(regex.match(name) for regex in self.regexes)

    def may_match(self, prefix: str) -> bool:
        """Could a continuation of `prefix` without `/` match? A regular expression always might."""
        tails = (tokens[at:] for tokens in self.globs for at in _reached(tokens, prefix))
        return not self.globs or any("/" not in tail for tail in tails)

    def may_match_word(self, prefix: str, suffix: str) -> bool:
        """Could some word between these two match? A regular expression always might."""
        return not self.globs or any(
            len(tokens) in _reached(tokens, suffix, _past_word(tokens, _reached(tokens, prefix)))
            for tokens in self.globs
        )

    def must_match(self, prefix: str) -> bool:
        """Does every continuation of `prefix` match?"""
        tails = (tokens[at:] for tokens in self.globs for at in _reached(tokens, prefix))
        return any(tail and set(tail) == {"*"} for tail in tails)


def _spelled_out(glob: str) -> list[str]:
    """A glob without slash means whole modules: `layers.0.*` has `layers.0` in it.

    One like `*weight` also means the names that end so. With a dot in it, it cannot: the star of
    `layers.*.down` would reach over the slash to an argument of another module.
    """
    if "/" in glob:
        return [glob]
    modules = [glob, glob.removesuffix(".*")] if glob.endswith(".*") else [glob]
    names = [glob] if glob.startswith("*") and "." not in glob else []
    return [*names, *(f"{module}/*" for module in modules)]


def _tokens(glob: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\[!?\]?[^\]]*\]|.", glob, flags=re.DOTALL))


def _reached(tokens: tuple[str, ...], text: str, start: Iterable[int] = (0,)) -> set[int]:
    """Positions in the glob after reading all of `text`: a small nondeterministic automaton."""
    states = _through_stars(tokens, set(start))
    for character in text:
        moved = set()
        for state in states:
            if state < len(tokens) and _accepts(tokens[state], character):
                moved.add(state if tokens[state] == "*" else state + 1)
        states = _through_stars(tokens, moved)
    return states


def _past_word(tokens: tuple[str, ...], states: set[int]) -> set[int]:
    """Positions after any word, which has no slash."""
    passed: set[int] = set()
    for state in states:
        end = next((at for at in range(state, len(tokens)) if tokens[at] == "/"), len(tokens))
        passed.update(range(state, end + 1))
    return passed


def _through_stars(tokens: tuple[str, ...], states: set[int]) -> set[int]:
    closed = set(states)
    for state in states:
        while state < len(tokens) and tokens[state] == "*":
            state += 1
            closed.add(state)
    return closed


def _accepts(token: str, character: str) -> bool:
    if token in ("*", "?"):
        return True
    return token == character if len(token) == 1 else fnmatch.fnmatchcase(character, token)


@dataclass(frozen=True, slots=True)
class Selection:
    """A set of names, described by patterns."""

    text: str
    _include: tuple[_Pattern, ...]
    _exclude: tuple[_Pattern, ...]

    @classmethod
    def parse(cls, patterns: str | Iterable[str]) -> Selection:
        """Parse comma-separated patterns, or a list of them; raises `SelectionError`."""
        texts = _split(patterns) if isinstance(patterns, str) else list(patterns)
        texts = [text.strip() for text in texts if text.strip()]
        if not texts or "!" in texts:
            raise SelectionError(
                f"{patterns!r} selects nothing; write globs over names such as "
                "'layers.*.attn.*/forward/*,!*/param/*', or '*' for everything."
            )
        include = tuple(_Pattern.compile(text) for text in texts if not text.startswith("!"))
        exclude = tuple(_Pattern.compile(text[1:]) for text in texts if text.startswith("!"))
        return cls(",".join(texts), include, exclude)

    def matches(self, name: str) -> bool:
        """Is this name (`module/phase/tensor`) selected?"""
        if self.excludes(name):
            return False
        return not self._include or any(pattern.matches(name) for pattern in self._include)

    def excludes(self, name: str) -> bool:
        """Does an excluding pattern match this name?"""
        return any(pattern.matches(name) for pattern in self._exclude)

    def matches_module(self, module: str) -> bool:
        """Is this module selected as a whole, by its name without phase and tensor?"""
        return self.matches(f"{module}/")

    def may_match(self, prefix: str) -> bool:
        """Could `prefix` be continued to a selected name, the rest being without `/`?

        Decides whether a hook is needed; `prefix` is `module/phase/` and the begin of a tensor.
        """
        if any(pattern.must_match(prefix) for pattern in self._exclude):
            return False
        return not self._include or any(pattern.may_match(prefix) for pattern in self._include)

    def takes_every(self, prefix: str, suffix: str) -> bool:
        """Is `prefix`, any word, `suffix` selected, whatever the word is?

        Sure only of globs: a word that an including pattern means in particular says nothing.
        """
        if any(pattern.may_match_word(prefix, suffix) for pattern in self._exclude):
            return False
        word = f"{prefix}{_ANY}{suffix}"
        return not self._include or any(pattern.matches(word) for pattern in self._include)

    def dead(self, names: Iterable[str], prefixes: Iterable[str]) -> list[str]:
        """Patterns that match none of `names` and no continuation of `prefixes`."""
        patterns = {pattern.text: pattern for pattern in (*self._include, *self._exclude)}
        for name in names:
            patterns = {t: p for t, p in patterns.items() if not p.matches(name)}
        for prefix in prefixes if patterns else ():
            patterns = {t: p for t, p in patterns.items() if not p.may_match(prefix)}
        return list(patterns)

    def nothing_in(self, names: Iterable[str], where: str, *, hint: str = "") -> SelectionError:
        """The error for a selection that matched none of `names`."""
        wanted = self._include[0].text if self._include else "*"
        return SelectionError(
            f"The selection {self.text!r} matches nothing in {where}. "
            f"Closest names: {', '.join(map(repr, closest(wanted, list(names))))}.{hint}"
        )


def closest(pattern: str, names: list[str], limit: int = 5) -> list[str]:
    """Names like the pattern; else everything of the modules whose path is most like its path."""
    close = difflib.get_close_matches(pattern, names, limit, cutoff=0.8)
    modules = list(dict.fromkeys(name.split("/")[0] for name in names))
    module = pattern.split("/")[0].strip("*.")
    alike = difflib.get_close_matches(module, modules, limit, cutoff=0.4) if module else []
    return close or [f"{path}/*" for path in alike] or names[:limit]


def _split(text: str) -> list[str]:
    """Split at commas outside brackets: `re:a{1,2},b` is two patterns."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += _BRACKETS.get(character, 0)
        if character == "," and depth <= 0:
            parts.append(text[start:position])
            start = position + 1
    return [*parts, text[start:]]


@dataclass(frozen=True, slots=True)
class Indices:
    """A set of steps or ranks: `5`, `0:3`, `0:100:10`, `10:`, or several with commas."""

    text: str
    _ranges: tuple[tuple[int, int | None, int], ...]

    @classmethod
    def parse(cls, text: str | int | Iterable[int] | None, what: str) -> Indices:
        """Parse; `None` or `""` means all. `what` names the setting in the `ConfigError`."""
        if text is not None and not isinstance(text, (str, int)):
            text = ",".join(map(str, text))
        words = [word.strip() for word in str("" if text is None else text).split(",")]
        try:
            return cls(",".join(words), tuple(_range(word) for word in words if word))
        except ValueError:
            raise ConfigError(
                f"{what}={text!r} cannot be read; write numbers or ranges start:stop:step, "
                "for example '0,5', '0:3', '100:' or '0:1000:100'."
            ) from None

    def __contains__(self, index: int) -> bool:
        return not self._ranges or any(
            start <= index and (stop is None or index < stop) and (index - start) % step == 0
            for start, stop, step in self._ranges
        )


def _range(word: str) -> tuple[int, int | None, int]:
    parts = word.split(":")
    numbers = [int(part) if part.strip() else None for part in parts]
    if len(parts) > 3 or any(number is not None and number < 0 for number in numbers):
        raise ValueError(word)
    if len(parts) == 1:
        only = int(word)
        return only, only + 1, 1
    start, stop, step = (*numbers, None)[:3]
    if step == 0:
        raise ValueError(word)
    return start or 0, stop, step or 1
