"""The tab Training: start, watch, stop and resume a training of the real pipeline and the real DPO."""

from __future__ import annotations

from typing import Any

import gradio as gr

from cai_experiment.demo.actions import CUSTOM, Actions
from cai_experiment.demo.sessions import Session
from cai_experiment.demo.tabs.wiring import QUIET, html, intro, shared
from cai_experiment.demo.trainings import MOST_EPOCHS, MOST_EXAMPLES, PLANS


class Panel:
    """The places that show how the training stands, and what to put there."""

    def __init__(self, plan: gr.Radio) -> None:
        self.plan = plan
        with gr.Row():
            self.start = gr.Button("Start Training", variant="primary")
            self.stop = gr.Button("Stop", variant="stop", interactive=False)
        self.said = html(elem_id="training-said")
        self.bar = html(elem_id="training-state")
        with gr.Row(equal_height=False, visible=False) as self.stopped:
            self.run = gr.Dropdown([], label="Run to resume", info="It was stopped, or it failed", min_width=240)
            self.resume = gr.Button("Resume", min_width=120)
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
        return [self.bar, self.plot, self.pairs, self.log, self.said, self.stop, self.stopped, self.run, self.plan]

    def news(self, actions: Actions, session: Session) -> list[Any]:
        """What has changed since this page was told last; the rest is skipped."""
        state, bar = actions.training(session)
        parts = {"bar": bar, "plot": state.plot_html, "pairs": state.pairs_html, "run log": state.log_html}
        told = [value if session.news(part, value) else gr.skip() for part, value in parts.items()]
        who = actions.trainings.who()
        plans = gr.skip()
        if session.news("plans", (who, state.run, state.stage)):  # the minutes are those of these models
            plans = gr.Radio(choices=actions.plans(), info=who)
        changed = session.news("stage", (state.run, state.stage), again=False)  # what the user chose since stays
        if not session.news("buttons", (state.run, state.stage)) and not changed:
            return [*told, *[gr.skip()] * 4, plans]
        runs = actions.trainings.runs_to_resume()
        listed = gr.Dropdown(choices=runs, value=runs[0] if runs else None) if changed else gr.skip()
        said, stop = "" if changed else gr.skip(), gr.Button(interactive=state.can_stop)
        return [*told, said, stop, gr.Row(visible=bool(runs)), listed, plans]


def build(actions: Actions) -> Panel:
    """Lay the tab out; the page's timer fills the panel."""
    intro("Train the generation model on preference pairs that it makes itself: answer, critique, revision, then DPO.")
    plans = actions.plans()
    first = plans[0][1]
    plan = gr.Radio(plans, value=first, label="Plan")
    with gr.Row(visible=False) as own:
        examples = gr.Number(PLANS[first][0], label="Examples", precision=0, minimum=1, maximum=MOST_EXAMPLES)
        epochs = gr.Number(PLANS[first][1], label="Epochs", precision=0, minimum=1, maximum=MOST_EPOCHS)
    panel = Panel(plan)
    plan.change(lambda chosen: gr.Row(visible=chosen == CUSTOM), plan, own, **QUIET)
    for button, work, inputs, queue in (
        (panel.start, actions.start_training, [plan, examples, epochs], "training"),
        (panel.stop, actions.stop_training, [], "stop"),  # it must not wait for a Start that waits for the GPU
        (panel.resume, actions.resume_training, [panel.run], "training"),
    ):
        button.click(shared(work), inputs, panel.said, concurrency_limit=1, concurrency_id=queue, **QUIET)
    return panel
