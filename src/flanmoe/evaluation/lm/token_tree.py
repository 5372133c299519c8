"""A plan that computes every token once: texts with a common beginning share its keys and values.

Texts form a tree whose edges are token sequences. A long edge with much below it becomes a
`Prefix`: it runs once, alone, and its keys and values are kept while what is below it runs. A
branch that is short as a whole (a question with its answer choices) becomes a `Row`: its tokens
stand in one row, and each token attends to those on its own way to the root.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Int

Tokens = tuple[int, ...]

# A branch of no more tokens than this may become one row. Attention inside a row is computed
# between all of its tokens, also those of different branches, so long rows waste work.
MOST_TOKENS_IN_A_TREE = 512
# A branch becomes one row where that saves at least this share of the tokens of its texts.
_LEAST_SAVING = 0.2
# A prefix costs a forward pass of its own, which reads all weights. It is worth one from this many
# tokens on that it saves the rows below it.
_LEAST_TOKENS_SAVED = 64


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens that a model reads, and where its predictions begin to matter.

    Attributes:
        tokens: what the model reads.
        first_needed: position of the first token whose prediction is asked for.
    """

    tokens: Tokens
    first_needed: int


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Tokens that several rows begin with; computed once, after those of its parent.

    Attributes:
        tokens: what it adds to its parent.
        parent: the prefix before it, None at the beginning of a text.
    """

    tokens: Tokens
    parent: "Prefix | None" = None

    @property
    def length(self) -> int:
        """Tokens up to its end, those of its parents included."""
        return len(self.tokens) + (self.parent.length if self.parent else 0)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """Branches of one tree, token after token. Q tokens.

    Attributes:
        tokens: the tokens; each stands behind its predecessor.
        predecessors: for each token the place in the row of the one before it in its text, -1 where that
            is the end of the prefix.
        ends: for each text in the row, its number and the place of its last token.
    """

    tokens: Tokens
    predecessors: tuple[int, ...]
    ends: tuple[tuple[int, int], ...]

    @property
    def is_chain(self) -> bool:
        """Whether every token follows the one to its left."""
        return all(before == place - 1 for place, before in enumerate(self.predecessors))

    def depths(self) -> Int[np.ndarray, " Q"]:
        """Return how far each token is behind the end of the prefix, 0 for the first."""
        depths = np.zeros(len(self.tokens), dtype=np.int64)
        for place, before in enumerate(self.predecessors):
            depths[place] = depths[before] + 1 if before >= 0 else 0
        return depths

    def visible(self) -> Bool[np.ndarray, "Q Q"]:
        """Return for each token (first axis) which tokens of the row it attends to."""
        visible = np.eye(len(self.tokens), dtype=bool)
        for place, before in enumerate(self.predecessors):
            if before >= 0:
                visible[place] |= visible[before]
        return visible

    def texts(self) -> Int[np.ndarray, " Q"]:
        """Return for each token the first text of the row that it belongs to."""
        texts = np.full(len(self.tokens), -1, dtype=np.int64)
        for text, place in self.ends:
            while place >= 0 and texts[place] < 0:
                texts[place] = text
                place = self.predecessors[place]
        return texts

    def path(self, place: int, length: int) -> list[int]:
        """Return the places of the last `length` tokens on the way to `place`, in their order."""
        places: list[int] = []
        while len(places) < length:
            places.append(place)
            place = self.predecessors[place]
        return places[::-1]


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Rows that share a prefix.

    Attributes:
        prefix: what stands before each of them, None for nothing.
        rows: the rows, longest first.
    """

    prefix: Prefix | None
    rows: tuple[Row, ...]


@dataclass(slots=True)
class _Node:
    """A place where texts part or end. The edge that leads to it belongs to it."""

    tokens: Tokens
    texts: list[int] = field(default_factory=list[int])
    children: "list[_Node]" = field(default_factory=list["_Node"])
    # Of everything at and below it: tokens of the edges, texts, their tokens if nothing were
    # shared (from the end of this edge on), and the first position that any of them needs.
    size: int = 0
    num_texts: int = 0
    apart: int = 0
    first_needed: int = 0


def plan(texts: Sequence[Text], *, branching: bool = True) -> list[Group]:
    """Return what to run so that common beginnings run once.

    Groups come in an order in which the prefixes of one are never needed again after those of another
    have taken their place: a prefix is followed by everything below it.

    Args:
        texts: what is to be read, none empty. Equal ones should be merged before.
        branching: whether a row may hold several texts that part inside it; without it only
            prefixes are shared.
    """
    if not texts:
        return []
    root = _tree(texts)
    planner = _Planner(branching)
    planner.visit(root, carried=(), prefix=None)
    return planner.groups()


def num_computed(groups: Sequence[Group]) -> int:
    """Return the tokens of all rows and prefixes."""
    prefixes: dict[Prefix, int] = {}
    for group in groups:
        part = group.prefix
        while part is not None:
            prefixes[part] = len(part.tokens)
            part = part.parent
    rows = sum(len(row.tokens) for group in groups for row in group.rows)
    return rows + sum(prefixes.values())


def mean_before(groups: Sequence[Group]) -> float:
    """Return how many tokens of a prefix stand before a token of a row, on average; 0 without rows."""
    lengths = [
        (group.prefix.length if group.prefix else 0, len(row.tokens))
        for group in groups
        for row in group.rows
    ]
    num_tokens = sum(own for _, own in lengths)
    return sum(before * own for before, own in lengths) / max(num_tokens, 1)


class _Planner:
    def __init__(self, branching: bool) -> None:
        self._branching = branching
        self._rows: dict[Prefix | None, list[Row]] = {}

    def groups(self) -> list[Group]:
        """Rows by prefix, in the order in which prefixes were met."""
        return [
            Group(prefix, tuple(sorted(rows, key=lambda row: -len(row.tokens))))
            for prefix, rows in self._rows.items()
        ]

    def visit(self, root: _Node, *, carried: Tokens, prefix: Prefix | None) -> None:
        # A stack of its own: texts may part at more places than Python may recurse.
        stack = [(root, carried, prefix)]
        while stack:
            node, carried, prefix = stack.pop()
            edge = carried + node.tokens
            if not node.children or (self._branching and _fits_into_a_row(node, edge)):
                self._add(prefix, _row(node, edge))
                continue
            if node.texts:
                self._add(prefix, _row(_Node(node.tokens, node.texts), edge))
            if _is_worth_a_prefix(node, edge, prefix):
                prefix, edge = Prefix(edge, prefix), ()
            stack += [(child, edge, prefix) for child in reversed(node.children)]

    def _add(self, prefix: Prefix | None, row: Row) -> None:
        self._rows.setdefault(prefix, []).append(row)


def _fits_into_a_row(node: _Node, edge: Tokens) -> bool:
    together = len(edge) + node.size - len(node.tokens)
    apart = len(edge) * node.num_texts + node.apart
    return together <= MOST_TOKENS_IN_A_TREE and together <= (1 - _LEAST_SAVING) * apart


def _is_worth_a_prefix(node: _Node, edge: Tokens, prefix: Prefix | None) -> bool:
    length = len(edge) + (prefix.length if prefix else 0)
    # Below here there will be about as many rows as children.
    saved = len(edge) * (len(node.children) - 1)
    return saved >= _LEAST_TOKENS_SAVED and node.first_needed >= length


def _row(node: _Node, edge: Tokens) -> Row:
    tokens: list[int] = []
    predecessors: list[int] = []
    ends: list[tuple[int, int]] = []
    stack = [(node, edge, -1)]
    while stack:
        current, added, before = stack.pop()
        for token in added:
            predecessors.append(before)
            before = len(tokens)
            tokens.append(token)
        ends += [(text, before) for text in current.texts]
        stack += [(child, child.tokens, before) for child in reversed(current.children)]
    return Row(tuple(tokens), tuple(predecessors), tuple(ends))


def _tree(texts: Sequence[Text]) -> _Node:
    order = sorted(range(len(texts)), key=lambda number: texts[number].tokens)
    root = _Node(())
    # The way to the last text: nodes with the length of the text up to their ends.
    way: list[tuple[_Node, int]] = [(root, 0)]
    before: Tokens = ()
    for number in order:
        tokens = texts[number].tokens
        common = _num_common(before, tokens)
        while way[-1][1] > common:
            node, end = way.pop()
            if way[-1][1] < common:
                way.append((_split(way[-1][0], node, end - common), common))
        if len(tokens) > common:
            leaf = _Node(tokens[common:])
            way[-1][0].children.append(leaf)
            way.append((leaf, len(tokens)))
        way[-1][0].texts.append(number)
        before = tokens
    _measure(root, texts)
    return root


def _split(parent: _Node, node: _Node, num_below: int) -> _Node:
    """Put a new node into the edge to the last child, `num_below` tokens before its end."""
    upper = _Node(node.tokens[:-num_below], children=[node])
    node.tokens = node.tokens[-num_below:]
    parent.children[-1] = upper
    return upper


def _num_common(first: Tokens, second: Tokens) -> int:
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    low, high = 0, shorter
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _measure(root: _Node, texts: Sequence[Text]) -> None:
    for node in reversed(list(_every(root))):
        node.size = len(node.tokens) + sum(child.size for child in node.children)
        node.num_texts = len(node.texts) + sum(child.num_texts for child in node.children)
        node.apart = sum(
            child.apart + len(child.tokens) * child.num_texts for child in node.children
        )
        needed = [texts[number].first_needed for number in node.texts]
        node.first_needed = min([*needed, *(child.first_needed for child in node.children)])


def _every(root: _Node) -> Iterator[_Node]:
    stack = [root]
    while stack:
        node = stack.pop()
        yield node
        stack += node.children
