"""What the widgets share."""

from __future__ import annotations

from io import BytesIO


def named_box(name: str, children: list):
    """A column of widgets with the CSS class ``safelab-NAME``."""
    import ipywidgets as w

    return w.VBox(children).add_class(f"safelab-{name}")


def png(figure) -> bytes:
    """A figure as PNG, for an ``Image`` widget."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
