"""A result as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .results import Result

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto }}
table {{ border-collapse: collapse }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child, .line, .reason {{ text-align: left }}
th, td:first-child {{ white-space: nowrap }}
code {{ font-size: 13px; background: #f4f4f4; padding: .1rem .3rem }}
button {{ font-size: 12px; cursor: pointer }}
img {{ max-width: 100%; margin: 1rem 0 }}
.reason {{ color: #777 }}
footer {{ color: #777; margin-top: 2rem }}
</style>
<h1>{title}</h1>
{warning}
<table>
<tr>{headings}</tr>
{rows}
</table>
{plot}
{notes}
<footer>{footer}</footer>
<script>
for (const button of document.querySelectorAll("button"))
  button.onclick = () => navigator.clipboard.writeText(button.previousElementSibling.textContent)
</script>
</html>
"""


def page(result: Result) -> str:
    """The page: the table with the lines to copy, the plot, notes, and where it was measured."""
    measures = result._shown()
    columns = ["", "kept", *(measure.name for measure in measures), ""]
    headings = "".join(f"<th>{escape(name)}</th>" for name in columns)
    made = result.origin
    footer = (
        f"{made.cpu}, {made.threads} threads, torch {made.torch}, transformers "
        f"{made.transformers}, tokred {made.tokred} {made.revision}, {made.date}"
    )
    return _PAGE.format(
        title=escape(result.title),
        warning="<p><b>Interrupted: not all was measured.</b></p>" if result.interrupted else "",
        headings=headings,
        rows="\n".join(_row(result, number) for number in range(-1, len(result.rows))),
        plot=_plot(result),
        notes="".join(f"<p>{escape(note)}</p>" for note in result.notes),
        footer=escape(footer),
    )


def _row(result: Result, number: int) -> str:
    """A row of the table; -1 is the dense model."""
    row = result.dense if number < 0 else result.rows[number]
    if row.reason:
        span = len(result._shown()) + 2
        reason = f'<td class="reason" colspan="{span}">{escape(row.reason)}</td>'
        return f"<tr><td>{escape(row.label)}</td>{reason}</tr>"
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in result._cells(row))
    line = f"<code>{escape(row.line)}</code> <button>copy</button>" if row.line else ""
    return f'<tr>{cells}<td class="line">{line}</td></tr>'


def _plot(result: Result) -> str:
    """The plot inside the page; nothing where matplotlib is not installed."""
    try:
        figure = result._figure()
    except ImportError:
        return "<p>Where matplotlib is installed, a plot stands here.</p>"
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="the figures of the table" src="data:image/png;base64,{data}">'
