"""What a measurement says to a reader."""

from __future__ import annotations

from ddetr_cli.bench.tables import Table


def test_markdown_has_a_rule_below_the_headings_figures_to_the_right_and_notes_as_a_list() -> None:
    table = Table("speeds", ("model", "precision", "ms"), (("r50", "fp32", "12.5"), ("a|b", "", "")), 2, ("a note",))
    assert table.markdown() == (
        "**speeds**\n"
        "\n"
        "| model | precision | ms |\n"
        "| --- | --- | ---: |\n"
        "| r50 | fp32 | 12.5 |\n"
        "| a\\|b |  |  |\n"
        "\n"
        "- a note\n"
    )
