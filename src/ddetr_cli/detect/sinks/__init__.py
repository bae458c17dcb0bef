"""What a run leaves behind, one file per family of formats; ``assemble.make_sinks`` puts those of a run together.

A sink of tables writes from the results alone, so that a run taken up again can hand over finished results once more
and end with the same bytes: no times in any file, and every number written in one way.
"""
