"""What the widgets share."""

from __future__ import annotations

from io import BytesIO

# ipywidgets names every control by its label but a slider's handle and its readout, gives a picture no alternative text
# (its own `tooltip` breaks an Image), and says of a choice among options its number. So a screen reader would say "slider, 5"
# and neither of what nor which.
_NAMES = """
function say(node, attribute, text) {
  if (node.getAttribute(attribute) !== text) node.setAttribute(attribute, text);
}
function names(box) {
  for (const slider of box.querySelectorAll('.widget-slider')) {
    const label = slider.querySelector('.widget-label').textContent, readout = slider.querySelector('.widget-readout');
    const handles = slider.querySelectorAll('.noUi-handle');
    handles.forEach((handle, i) => say(handle, 'aria-label', handles.length > 1 ? label + [' from', ' to'][i] : label));
    if (handles.length === 1) say(handles[0], 'aria-valuetext', readout.textContent);  // of a choice: itself, not its number
    if (readout.isContentEditable) {
      readout.setAttribute('role', 'textbox');
      say(readout, 'aria-label', label + ', typed');
    }
  }
  for (const label of box.querySelectorAll('.widget-label[title=null]')) label.removeAttribute('title');
  for (const text of box.querySelectorAll('.widget-html-content')) say(text, 'aria-live', 'polite');
  for (const picture of box.querySelectorAll('.widget-image')) picture.alt = 'Picture of the NAME; the text beside it says what it shows';
}
function start(tries) {
  const box = element.closest('.safelab-CLASS');
  if (!box) return tries && setTimeout(start, 100, tries - 1);  // not on the page yet
  names(box);
  new MutationObserver(() => names(box)).observe(box, {childList: true, subtree: true});
}
start(100);
"""


def named_box(name: str, children: list):
    """A column of widgets with the CSS class ``safelab-NAME``, in which every control has a name for a screen reader."""
    import ipywidgets as w

    script = _NAMES.replace("CLASS", name).replace("NAME", name.replace("-", " "))
    shown = {"output_type": "display_data", "data": {"application/javascript": script}, "metadata": {}}
    return w.VBox([*children, w.Output(outputs=(shown,))]).add_class(f"safelab-{name}")


def png(figure) -> bytes:
    """A figure as PNG, for an ``Image`` widget."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
