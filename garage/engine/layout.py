"""How layers share pages: those that see equally far form a group with a page table of its own.

A layer with a sliding window needs only the tokens within it, so its group's pages that lie wholly behind the window are given back
while the sequence runs; layers that see everything keep all theirs. There is one pool, and a page of either group has the same bytes:
storage is `lanes` tensors of units, a unit is room for `page_size` tokens of one layer, and a page is `units` adjacent units of every lane.

    Gemma 3 12B: 8 layers see all, 40 see 1,024 tokens. 8 lanes, pages of 5 units.
    page of the 8 layers      lane i holds layer i,              units 0 to 4 hold 5 x page_size tokens
    page of the 40 layers     lane i holds layers i, i + 8, ..., unit j holds page_size tokens of one of them

So neither kind can starve while the other has room, and nothing must be guessed about the length of texts. A model whose layers all see
equally far, or whose window no text can exceed, has one group, one unit, and pays nothing.

When the larger group is not a multiple of the smaller, the last units of its pages are empty (1B: 2 of 24).
"""

from dataclasses import dataclass

from garage.engine.pages import Group
from garage.models.config import Config


@dataclass(frozen=True)
class Table:
    """What a layer's page table is made from: pages of `group`; the layer's first unit in a page is `unit`."""

    group: int
    unit: int


@dataclass(frozen=True)
class Layout:
    """Groups of layers; `lanes` and `tables` say for each layer where it lies."""

    page_size: int
    units: int
    num_lanes: int
    groups: tuple[Group, ...]
    lanes: tuple[int, ...]
    tables: tuple[Table, ...]

    @staticmethod
    def of(config: Config, page_size: int, longest: int) -> "Layout":
        """The layout of a model whose texts have at most `longest` tokens."""
        members: dict[int | None, list[int]] = {}
        for layer in range(config.num_hidden_layers):
            window = config.window(layer)
            members.setdefault(None if window is None or window >= longest else window, []).append(layer)
        num_lanes = min(map(len, members.values()))
        units = max(-(-len(layers) // num_lanes) for layers in members.values())
        groups: list[Group] = []
        places: dict[int, tuple[int, Table]] = {}
        for number, (window, layers) in enumerate(members.items()):
            width = units // -(-len(layers) // num_lanes)
            groups.append(Group(width * page_size, window))
            places |= {layer: (i % num_lanes, Table(number, i // num_lanes * width)) for i, layer in enumerate(layers)}
        lanes, tables = zip(*(places[layer] for layer in range(config.num_hidden_layers)), strict=True)
        return Layout(page_size, units, num_lanes, tuple(groups), lanes, tables)

    def page_bytes(self, config: Config, itemsize: int) -> int:
        """Bytes of a page, keys and values."""
        return 2 * self.num_lanes * self.units * self.page_size * config.num_key_value_heads * config.head_dim * itemsize

    def pages_for(self, num_pages: int) -> int:
        """Pages that hold as many tokens as `num_pages` of `page_size` would if all layers kept everything."""
        return sum(-(-num_pages * self.page_size // group.span) for group in self.groups)

    def most(self, length: int, chunk: int) -> int:
        """The most pages that one sequence of `length` tokens holds at once, computed in pieces of at most `chunk`."""
        return sum(group.most(length, chunk) for group in self.groups)
