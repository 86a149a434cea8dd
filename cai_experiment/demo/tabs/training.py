"""The tab Training: start, watch, stop and resume a training of the real pipeline and the real DPO."""

from __future__ import annotations

from typing import Any

import gradio as gr

from cai_experiment.demo.actions import CUSTOM, Actions
from cai_experiment.demo.sessions import Session
from cai_experiment.demo.tabs.wiring import PRIVATE, QUIET, html, intro, shared
from cai_experiment.demo.trainings import MOST_EPOCHS, MOST_EXAMPLES, PLANS


class Panel:
    """The places that show how the training stands, and what to put there."""

    def __init__(self) -> None:
        self.bar = html(elem_id="training-state")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300):
                self.plot = html(elem_id="training-plot")
            with gr.Column(scale=1, min_width=300):
                self.pairs = html(elem_id="training-pairs")
        with gr.Accordion("What the run says", open=False):
            self.log = html(elem_id="training-log")

    @property
    def outputs(self) -> list[Any]:
        """In the order of `news`."""
        return [self.bar, self.plot, self.pairs, self.log]

    def news(self, actions: Actions, session: Session) -> list[Any]:
        """What has changed since this page was told last; the rest is skipped."""
        state, bar = actions.training(session)
        parts = {"bar": bar, "plot": state.plot_html, "pairs": state.pairs_html, "run log": state.log_html}
        return [value if session.news(part, value) else gr.skip() for part, value in parts.items()]


def build(actions: Actions, tab: gr.Tab) -> Panel:
    """Lay the tab out; the page's timer fills the panel."""
    intro("Train the generation model on preference pairs that it makes itself: answer, critique, revision, then DPO.")
    plans = actions.plans()
    first = plans[0][1]
    plan = gr.Radio(plans, value=first, label="Plan")
    with gr.Row(visible=False) as own:
        examples = gr.Number(PLANS[first][0], label="Examples", precision=0, minimum=1, maximum=MOST_EXAMPLES)
        epochs = gr.Number(PLANS[first][1], label="Epochs", precision=0, minimum=1, maximum=MOST_EPOCHS)
    with gr.Row():
        start = gr.Button("Start Training", variant="primary")
        stop = gr.Button("Stop", variant="stop")
    said = html(elem_id="training-said")
    panel = Panel()
    with gr.Row(equal_height=False):
        run = gr.Dropdown([], label="Run to resume", info="A training that was stopped or failed", min_width=240)
        resume = gr.Button("Resume", min_width=120)
    plan.change(lambda chosen: gr.Row(visible=chosen == CUSTOM), plan, own, **QUIET)
    listed = shared(lambda chosen: _runs(actions, chosen))
    for button, work, inputs in (
        (start, actions.start_training, [plan, examples, epochs]),
        (stop, actions.stop_training, []),
        (resume, actions.resume_training, [run]),
    ):
        button.click(shared(work), inputs, said, concurrency_limit=1, concurrency_id="training", **PRIVATE).then(
            listed, run, run, **QUIET
        )
    tab.select(listed, run, run, **QUIET)
    run.focus(listed, run, run, **QUIET)
    return panel


def _runs(actions: Actions, chosen: str | None) -> Any:
    found = actions.trainings.runs_to_resume()
    return gr.Dropdown(choices=found, value=chosen if chosen in found else found[0] if found else None)
