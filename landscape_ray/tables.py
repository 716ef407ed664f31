"""Tables in a terminal, which never cut off a name or a number: only columns that say so give way in a narrow one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

GAP = 2
"""Spaces between columns."""
LEAST = 8
"""Characters that a column which gives way keeps."""


class TextTable:
    """A table without lines; print it with `crop=False`, since it is as wide as what must not be cut.

    Args:
        headings: of the columns.
        right: names of the columns of numbers, which are aligned to the right.
        flexible: names of the columns that are cut short with an ellipsis in a terminal that is too narrow for all of
            them, the widest first. In a file nothing is cut.
        title: above the table.

    >>> import io
    >>> table = TextTable(("name", "loss", "remark"), right=("loss",), flexible=("remark",))
    >>> table.add_row("t0", "1.5", "longer than there is room for")
    >>> terminal = Console(file=io.StringIO(), width=24, force_terminal=True, color_system=None)
    >>> terminal.print(table, crop=False)
    >>> terminal.file.getvalue().splitlines()
    ['name  loss  remark      ', 't0     1.5  longer than…']
    """

    def __init__(
        self, headings: Sequence[str], *, right: Sequence[str] = (), flexible: Sequence[str] = (), title: str = ""
    ) -> None:
        self.headings, self.right, self.flexible, self.title = tuple(headings), set(right), set(flexible), title
        self.rows: list[tuple[tuple[RenderableType, ...], str]] = []

    def add_row(self, *cells: RenderableType, style: str = "") -> None:
        """Add a row of as many cells as there are headings; text is taken as it is, without markup."""
        self.rows.append((tuple(Text(cell) if isinstance(cell, str) else cell for cell in cells), style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Lay the table out for a terminal of this width."""
        widths = [
            max([cell_len(heading), *(_width(row[place], console, options) for row, _ in self.rows)])
            for place, heading in enumerate(self.headings)
        ]
        if console.is_terminal:
            self._shrink(widths, options.max_width)
        # the title is not the table's own: rich would wrap it at the width of the table
        if self.title:
            yield Text(self.title, style="italic", no_wrap=True, overflow="ignore")
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0), collapse_padding=True)
        for place, heading in enumerate(self.headings):
            table.add_column(
                heading,
                justify="right" if heading in self.right else "left",
                no_wrap=True,
                overflow="ellipsis",
                width=widths[place],
            )
        for cells, style in self.rows:
            table.add_row(*cells, style=style)
        table.width = sum(widths) + GAP * (len(widths) - 1)
        yield table

    def _shrink(self, widths: list[int], room: int) -> None:
        """Take what is too much from the widest of the flexible columns, character by character, in place."""
        excess = sum(widths) + GAP * (len(widths) - 1) - room
        flexible = [place for place, heading in enumerate(self.headings) if heading in self.flexible]
        while excess > 0 and flexible:
            widest = max(flexible, key=lambda place: widths[place])
            if widths[widest] <= LEAST:
                return
            widths[widest] -= 1
            excess -= 1


def _width(cell: RenderableType, console: Console, options: ConsoleOptions) -> int:
    if isinstance(cell, Text):
        return max((cell_len(line) for line in cell.plain.split("\n")), default=0)
    return console.measure(cell, options=options).maximum
