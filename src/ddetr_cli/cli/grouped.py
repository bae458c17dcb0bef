"""A command whose help lists its options in groups, in plain text: rich would take most of the time of --help."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand

if TYPE_CHECKING:
    from collections.abc import Sequence


class GroupedCommand(TyperCommand):
    """Options that name a ``rich_help_panel`` stand under it, in the order of the panels; the rest under Options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of the help page that list arguments and options."""
        sections: dict[str, list[Sequence[str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                is_argument = parameter.param_type_name == "argument"
                panel = getattr(parameter, "rich_help_panel", None) or ("Arguments" if is_argument else "Options")
                sections.setdefault(panel, []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)
