"""`vcache heads HEAD --count` on the screen."""

from typing import Any

from rich.markup import escape

from vcache.pipelines.console import out
from vcache.pipelines.counting import counter, giga
from vcache.pipelines.head_listing import line, pairs


def print_counts(rows: list[dict[str, Any]]) -> None:
    """Rows of the paper as a table, a configuration of one's own in words."""
    if "paper_gmacs" in rows[0]:
        head = counter(rows[0]["head"])
        # A table of rich would cut numbers on a narrow terminal, and a number that is cut tells nothing.
        for text in (*head.table(rows), *(f"  {remark}" for remark in head.REMARKS)):
            out.print(text, highlight=False, markup=False, soft_wrap=True)
        return
    for row in rows:
        computed = getattr(counter(row["head"]), "COMPUTED", "as it is computed here")
        out.print(f"[bold]{escape(row['name'])}[/bold]", highlight=False)
        line("config", pairs(row["config"]))
        line("parameters", f"{row['parameters']:,}")
        line(
            "head",
            f"{giga(row['head_macs'])} GMACs a clip as the paper has it, {giga(row['computed_macs'])} {computed}",
        )
        line("backbone", f"{giga(row['backbone_macs'])} GMACs a clip")
        line("together", f"{row['total_gmacs']:,.1f} GMACs, views: {row['num_views']}")
