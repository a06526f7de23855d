"""Texts of others on a terminal."""

import unicodedata

NEWLINE = "↵"

_JOINERS = "\u200c\u200d"  # of scripts and emoji: they change letters' shapes, not where letters stand


def printable(text: str) -> str:
    """The text with newlines marked, and with a visible stand-in for whatever could command a terminal."""
    return text if text.isascii() and text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character == "\n":
        return f"{NEWLINE}\n"
    if character == "\t":
        return "⇥\t"
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)  # the pictures of the control characters
    harmless = character in _JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return character if harmless else f"\\u{code:04x}"
