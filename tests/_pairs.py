"""Pairs of choices instead of all combinations: nearly every fault shows with one choice or two. With `--exhaustive`
all combinations are there.

    @pytest.mark.parametrize(("dtype", "layout", "name"), pairs(DTYPES, LAYOUTS, BACKENDS))
    @over(covering(CASES, lambda case: words_of(case[1].id)))

The same rows every time. A row that must be there whatever the others are is added by hand.
"""

import itertools
import os
import re
from collections.abc import Callable, Hashable, Iterable, Sequence


def exhaustive() -> bool:
    """Whether pytest was given `--exhaustive`."""
    return bool(os.environ.get("FLOWKERNELS_EXHAUSTIVE"))


def pairs(*choices: Iterable) -> list[tuple]:
    """Rows of one choice of each kind in which every choice of one kind meets every choice of every other."""
    kinds = [list(kind) for kind in choices]
    rows = list(itertools.product(*kinds))
    if exhaustive() or len(kinds) < 3:
        return rows
    places = itertools.product(*(range(len(kind)) for kind in kinds))  # choices need not be hashable
    return [rows[i] for i in _cover([list(enumerate(place)) for place in places])]


def beside(*groups: Sequence[tuple]) -> list[tuple]:
    """Rows of one of each group, for groups that have nothing to do with one another: as many as the longest has, the
    rows of the others again and again."""
    if exhaustive():
        chosen = itertools.product(*groups)
    else:
        chosen = zip(*([group[i % len(group)] for i in range(max(map(len, groups)))] for group in groups), strict=True)
    return [tuple(itertools.chain(*rows)) for rows in chosen]


def covering(cases: Sequence, words: Callable[..., Iterable[Hashable]], together: int = 2) -> list:
    """Of these cases the ones that have every word that some case has, with every other one and without; or, with
    `together=1`, every word, and are without it."""
    if exhaustive():
        return list(cases)
    of_case = [set(words(case)) for case in cases]
    known = list(dict.fromkeys(word for case in cases for word in words(case)))
    return [cases[i] for i in _cover([[(word, word in of) for word in known] for of in of_case], together)]


def words_of(text: str) -> list[str]:
    """The words of a name, their numbers left out but for those of types and for nothing, 0."""

    def of(word: str) -> str:
        return word if "float" in word else re.sub(r"\d*[1-9]\d*(\.\d+)?", "n", word)

    return [of(word) for word in re.split(r"[- ]", text)]


def _cover(rows: list[list], together: int = 2) -> list[int]:
    """Places of rows that have all pairs of entries that any has, in order: each time the one with the most that are
    still to come."""
    of_row = [{frozenset(c) for c in itertools.combinations(dict.fromkeys(row), together)} for row in rows]
    left, taken = set().union(*of_row), []
    while left:
        best = max(range(len(rows)), key=lambda i: (len(of_row[i] & left), -i))
        left -= of_row[best]
        taken.append(best)
    return sorted(taken)
