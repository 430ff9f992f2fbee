"""Check regular expressions of a config: whether they are valid, and by their text whether they may run for ever."""

import re

_MOST_REPEATS = 3
_REPEAT = re.compile(r"[*+?]|\{\d*,?\d*\}")
_SET, _GROUP = r"\[\^?\]?(?:\\.|[^\]\\])*\]", r"\(\?(?:P?<\w+>|P?[=!:<]+|[aiLmsux-]+[:)])?"
_TOKEN = re.compile(rf"\\.|{_SET}|{_GROUP}|{_REPEAT.pattern}|.", re.DOTALL)


def fault(pattern: str) -> str | None:
    """Return why a text is no regular expression, or one that Python cannot compile; None if it is one."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return None


def may_hang(pattern: str) -> bool:
    """Return whether matching may take very long: it repeats what itself has a choice, or has many repeats in a row.

    Some harmless expressions are among them. With three repeats at most, of single characters or of groups without a
    choice, the time grows with the third power of the text's length at worst.
    """
    repeats = 0
    choices = [False]  # for each open group: whether its text can be matched in several ways
    closed = False  # whether the group that has just ended can
    previous = ""
    for token in _TOKEN.findall(pattern):
        if _REPEAT.fullmatch(token):
            if _REPEAT.fullmatch(previous):
                previous = ""  # `*?` and `*+` are one repeat
                continue
            repeats += 1
            if repeats > _MOST_REPEATS or (previous == ")" and closed and token != "?"):
                return True
            choices[-1] = True
        elif token.startswith("("):
            choices.append(False)
        elif token == ")" and len(choices) > 1:
            closed = choices.pop()
            choices[-1] |= closed
        elif token == "|":
            choices[-1] = True
        previous = token
    return False
