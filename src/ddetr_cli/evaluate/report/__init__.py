"""What ``ddetr eval --report`` writes: one page that needs no network, and its plots as PNG."""

from __future__ import annotations
