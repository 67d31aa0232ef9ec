r"""A JSON schema's `pattern`, as a regular expression of what stands between the quotes of a JSON string.

Each of its sets of characters is cut to those that stand in a JSON string as they are, which cuts its language down to
them. Where dialects differ (`\d` is ten characters in ECMA-262, all decimal digits in Python), a set is what it is in
all of them, so that any reader of the schema finds the answer valid.
"""

import re

from dllm_core.errors import RequestError

_NEVER = r'"\\\x00-\x1f\x7f-\x9f'
# What a class surely has, and what it may have.
_CLASSES = {"d": ("0-9", r"\d"), "w": ("0-9A-Za-z_", r"\w\p{N}"), "s": (r"\s", r"\s\x{feff}")}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v"}
_ESCAPE = r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[dDwWsSnrtfv]|[^A-Za-z0-9])"
_PIECE = re.compile(
    rf"(?P<escape>{_ESCAPE})|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<set>\[)|(?P<bar>\|)|(?P<begin>\^)|(?P<end>\$)"
    r"|(?P<repeat>(?:[*+?]|\{[0-9]+(?:,[0-9]*)?\})\??)|(?P<any>\.)|(?P<char>[^][(){}*+?|^$.\\])",
    re.DOTALL,
)
_MEMBER = re.compile(rf"{_ESCAPE}|[^][\\]", re.DOTALL)
_ATOMS = ("escape", "set", "any", "char", "close")  # what may be repeated
_REMEDY = "write it of characters, escapes, sets, groups, |, and counts, with ^ in front and $ at the end alone"


def in_json_string(pattern: str) -> str:
    """What all of a string must match. Raises RequestError for what is not kept, and where it stands.

    Not kept: look-around, flags and references, anchors within, classes of Unicode, and a quote, backslash or control
    character by itself, which no JSON string has unescaped.
    """
    written, level, at, before = list[str](), 0, 0, None
    while at < len(pattern):
        found = _PIECE.match(pattern, at)
        kind = found.lastgroup if found is not None else None
        if found is None or kind is None or (kind == "repeat" and before not in _ATOMS):
            raise _refused(pattern, at)
        text, behind = found[0], found.end()
        if kind in ("escape", "char"):
            written.append(_one(text, pattern, at))
        elif kind == "set":
            members, behind = _set(pattern, behind)
            written.append(members)
        elif kind == "any":
            written.append(rf"[^{_NEVER}\x{{2028}}\x{{2029}}]")
        elif kind == "begin":
            if level or before not in (None, "bar"):
                raise _refused(pattern, at)
        elif kind == "end":
            if level or pattern[behind : behind + 1] not in ("", "|"):
                raise _refused(pattern, at)
        else:
            written.append(text)
            level += {"open": 1, "close": -1}.get(kind, 0)
            if level < 0:
                raise _refused(pattern, at)
        before, at = kind, behind
    if level:
        raise _refused(pattern, at)
    return "".join(written)


def _one(text: str, pattern: str, at: int) -> str:
    """Outside of sets: an escape or a character."""
    character = _character(text)
    if character is None:
        return f"[{_class(text, is_wide=False)}&&[^{_NEVER}]]"
    if re.match(f"[{_NEVER}]", character):
        problem = f"pattern has {character!r} at character {at}, which no JSON string has unescaped"
        raise RequestError("constraint", problem, pattern, "leave it out")
    return _literal(character)


def _set(pattern: str, at: int) -> tuple[str, int]:
    """A set of characters whose bracket was read, and where what follows it begins."""
    is_negated = pattern.startswith("^", at)
    at += is_negated
    written = list[str]()
    while not pattern.startswith("]", at) or not written:
        first, at = _member(pattern, at)
        character = _character(first)
        if character is None:
            written.append(_class(first, is_wide=is_negated))
        elif pattern.startswith("-", at) and not pattern.startswith("-]", at):
            text, behind = _member(pattern, at + 1)
            last = _character(text)
            if last is None or last < character:
                raise _refused(pattern, at)
            written.append(f"{_literal(character)}-{_literal(last)}")
            at = behind
        else:
            written.append(_literal(character))
    members = "".join(written)
    return (rf"[^{members}{_NEVER}]" if is_negated else rf"[[{members}]&&[^{_NEVER}]]"), at + 1


def _member(pattern: str, at: int) -> tuple[str, int]:
    found = _MEMBER.match(pattern, at)
    if found is None:
        raise _refused(pattern, at)
    return found[0], found.end()


def _character(text: str) -> str | None:
    r"""That an escape or a character stands for; None for a class such as `\d`."""
    if text[0] != "\\" or len(text) == 1:
        return text
    if text[1] in "xu" and len(text) > 2:
        return chr(int(text[2:], 16))
    return None if text[1].lower() in _CLASSES else _CONTROLS.get(text[1], text[1])


def _class(text: str, *, is_wide: bool) -> str:
    sure, maybe = _CLASSES[text[1].lower()]
    if text[1].islower():
        return f"[{maybe if is_wide else sure}]"
    return f"[^{sure if is_wide else maybe}]"


def _literal(character: str) -> str:
    """A character spelled so that it means itself, inside a set of characters and outside."""
    return character if character.isalnum() else rf"\x{{{ord(character):x}}}"


def _refused(pattern: str, at: int) -> RequestError:
    what = f"{pattern[at]!r} at character {at}" if at < len(pattern) else "an end"
    return RequestError("constraint", f"pattern has {what}, which is not kept there", pattern, _REMEDY)
