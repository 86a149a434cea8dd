"""The tab Architecture: how the pipeline works, with the constitution."""

from __future__ import annotations

import gradio as gr

from cai_experiment.demo.actions import Actions
from cai_experiment.demo.tabs.wiring import LIGHT, html, intro, shared


def build(actions: Actions, tab: gr.Tab) -> None:
    """Lay the tab out; it is read when it is opened."""
    intro("How an answer becomes a preference pair, and a pair a training step; and the principles that decide.")
    page = html(elem_id="architecture")
    tab.select(shared(actions.architecture), None, page, **LIGHT)
