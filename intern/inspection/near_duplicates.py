"""Find the texts that are nearly the same as a given one, with an index of their rarest words."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from intern.data.text import comparable

WORD = re.compile(r"[^\W_]+")


def words(text: str) -> frozenset[str]:
    """Return the distinct words and numbers of a text; case does not count."""
    return frozenset(WORD.findall(comparable(text)))


class NearTexts:
    """An index of texts that finds those whose words overlap with another text's by a Jaccard index of at least `threshold`.

    Two such sets of n and m words share a word among the first n - ceil(threshold * n) + 1 of one and the first
    m - ceil(threshold * m) + 1 of the other, if both are in the same order (prefix filtering: Chaudhuri et al. 2006, Bayardo et al. 2007).
    In an order with the rarest words first, few texts share an index entry, so a lookup compares with a handful of texts, not with all.
    """

    def __init__(self, texts: Sequence[str], threshold: float) -> None:
        self._threshold = threshold
        self._sets = [words(text) for text in texts]
        counts = Counter(word for one in self._sets for word in one)
        self._rank = {word: rank for rank, word in enumerate(sorted(counts, key=lambda word: (counts[word], word)))}
        self._index: defaultdict[int, list[int]] = defaultdict(list)
        for place, one in enumerate(self._sets):
            for rank in sorted(self._rank[word] for word in one)[: self._prefix(len(one))]:
                self._index[rank].append(place)

    def near(self, text: str) -> list[tuple[int, float]]:
        """Return the indices of the near texts and their Jaccard index, best first; none for a text without words."""
        mine = words(text)
        known = sorted(self._rank[word] for word in mine if word in self._rank)
        # Words that no indexed text has are the rarest: they come first in the order and match nothing.
        prefix = self._prefix(len(mine)) - (len(mine) - len(known))
        candidates = {place for rank in known[: max(prefix, 0)] for place in self._index[rank]}
        found = [(place, self._similarity(mine, self._sets[place])) for place in candidates]
        return sorted(
            ((place, value) for place, value in found if value >= self._threshold), key=lambda pair: (-pair[1], pair[0])
        )

    def _prefix(self, count: int) -> int:
        return count - math.ceil(self._threshold * count) + 1 if count else 0

    @staticmethod
    def _similarity(a: frozenset[str], b: frozenset[str]) -> float:
        common = len(a & b)
        return common / (len(a) + len(b) - common)
