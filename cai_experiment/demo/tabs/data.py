"""The tab Data: a run's pairs and rejected rows, and one example's whole way."""

from __future__ import annotations

from typing import Any

import gradio as gr

from cai_experiment.demo.actions import ANY, Actions
from cai_experiment.demo.sessions import Session
from cai_experiment.demo.tabs.wiring import QUIET, html, intro, of_page, shared

WHICH_ROW = """element.addEventListener("click", event => {
  const row = event.target.closest("tbody tr");
  if (row) trigger("click", {row: [...row.parentElement.children].indexOf(row)});
})"""
KINDS = [("Pairs", "pairs"), ("Rejected", "rejected")]


def build(actions: Actions, tab: gr.Tab) -> None:
    """Lay the tab out; the list of runs is read again when `tab` is opened."""
    intro("What a run has made: pairs that were kept, rows that were refused. Click a row to see its whole way.")
    with gr.Row(equal_height=False):
        run = gr.Dropdown([], label="Run", min_width=200)
        kind = gr.Radio(KINDS, value="pairs", label="Rows", min_width=200)
    with gr.Row(equal_height=False):
        principle = gr.Dropdown([ANY], value=ANY, label="Principle", min_width=160)
        reason = gr.Dropdown([ANY], value=ANY, label="Reason", min_width=160)
        verdict = gr.Dropdown([ANY], value=ANY, label="Verdict", min_width=160)
    line = html(elem_id="data-line")
    table = gr.HTML(apply_default_css=False, js_on_load=WHICH_ROW, elem_id="data-table")
    page = gr.State(1)
    with gr.Row(visible=False) as turn:
        back, forward = gr.Button("Previous", size="sm"), gr.Button("Next", size="sm")
    example = html(elem_id="data-example")

    def listed(session: Session, *chosen: Any) -> Any:
        shown, said, at, pages = actions.browse(session, *chosen)
        return shown, gr.Row(visible=pages > 1), said, at, ""

    def filters(chosen: str | None) -> list[Any]:
        return [gr.Dropdown(choices=found, value=ANY) for found in actions.filters(chosen)]

    def runs(chosen: str | None) -> Any:
        found = actions.runs()
        return gr.Dropdown(choices=found, value=chosen if chosen in found else found[0] if found else None)

    inputs, outputs = [run, kind, principle, reason, verdict, page], [table, turn, line, page, example]
    show = of_page(actions, listed)
    reset = (shared(filters), run, [principle, reason, verdict])
    opened = tab.select(shared(runs), run, run, **QUIET).then(*reset, **QUIET)
    chosen = run.input(lambda: 1, None, page, **QUIET).then(*reset, **QUIET)
    for event in (opened, chosen):  # the filters of the run first, then its rows
        event.then(show, inputs, outputs, **QUIET)
    for choice in (kind, principle, reason, verdict):
        choice.input(lambda: 1, None, page, **QUIET).then(show, inputs, outputs, **QUIET)
    back.click(lambda at: max(1, at - 1), page, page, **QUIET).then(show, inputs, outputs, **QUIET)
    forward.click(lambda at: at + 1, page, page, **QUIET).then(show, inputs, outputs, **QUIET)

    def clicked(request: gr.Request, event: gr.EventData, chosen: str | None) -> str:
        return actions.example(actions.sessions.get(str(request.session_hash)), chosen, int(event.row))

    table.click(clicked, run, example, scroll_to_output=True, **QUIET)
