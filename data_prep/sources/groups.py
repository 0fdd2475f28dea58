"""Names that belong together because something shares them."""

from collections.abc import Iterable, Sequence


def tied(sets: Iterable[Sequence[str]]) -> list[str]:
    """For each set of names the first name of all that it is tied to: by a shared name, directly or by way of other sets."""
    sets = list(sets)
    place: dict[str, int] = {}  # of each name, in order of appearance
    parent: list[int] = []

    def root(name: str) -> int:
        found = place.setdefault(name, len(parent))
        if found == len(parent):
            parent.append(found)
        while parent[found] != found:
            parent[found] = found = parent[parent[found]]
        return found

    for members in sets:
        roots = [root(name) for name in members]
        for one in roots:
            parent[one] = min(roots)
    names = list(place)
    return [names[root(members[0])] for members in sets]
