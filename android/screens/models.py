"""The models on this device, and what each needs before it is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Event

from kivy.app import App
from kivy.factory import Factory
from kivy.properties import BooleanProperty, NumericProperty, StringProperty
from kivy.uix.screenmanager import Screen

from pocketslm.android.engine.meter import free_bytes
from pocketslm.android.engine.models import ModelCard
from pocketslm.android.widgets.basics import Card
from pocketslm.android.widgets.sheet import confirm

MEGA = 1_000_000


class ModelPanel(Card):
    name = StringProperty("")
    size_text = StringProperty("")
    memory_text = StringProperty("")
    memory_share = NumericProperty(0)
    fit = StringProperty("fits")
    speed_text = StringProperty("")
    context_text = StringProperty("")
    quality_text = StringProperty("")
    used = BooleanProperty(False)


class ModelsScreen(Screen):
    empty = BooleanProperty(True)

    def refresh(self) -> None:
        app = App.get_running_app()
        cards = app.models.list()
        self.empty = not cards
        shown = self.ids.models
        shown.clear_widgets()
        for card in cards:
            shown.add_widget(self._panel(card))
        if self.empty:
            shown.add_widget(Factory.EmptyModels())

    def _panel(self, card: ModelCard) -> ModelPanel:
        app = App.get_running_app()
        t, free = app.t, free_bytes()
        measured = app.settings["measured"].get(card.name)
        speed = (
            t(
                "speed_measured",
                prefill=round(measured["prefill"]),
                decode=round(measured["decode"]),
            )
            if measured
            else t("speed_bound", tps=round(card.bound_tps(app.models.bandwidth)))
        )
        memory = t("memory_needed", need=card.need_bytes // MEGA, free=free // MEGA)
        return ModelPanel(
            name=card.name,
            size_text=f"{card.size_bytes / MEGA:.0f} MB",
            memory_text=f"{memory}: {t(card.fit(free))}",
            memory_share=card.need_bytes / max(1, free),
            fit=card.fit(free),
            speed_text=speed,
            context_text=t("tokens", count=card.context),
            quality_text=t("quality_value", top1=f"{card.top1:.1%}"[:-1]) if card.top1 else "",
            used=card.name in (app.settings["model"], *app.settings["embedders"]),
        )

    def use(self, name: str) -> None:
        app = App.get_running_app()
        if app.models.embeds(name):
            app.find_by(name)
        else:
            app.settings["model"] = name
            app.unload()
        self.refresh()

    def add(self) -> None:
        app = App.get_running_app()
        app.phone.pick("model", app.t("choose_model"), (".zip",), app.import_model)

    def measure(self, name: str) -> None:
        """Time the model in a process of its own, so that the one in use is not disturbed."""
        app = App.get_running_app()
        app.notice(app.t("measuring"))

        def work(_: Event) -> Iterator[dict[str, float]]:
            from pocketslm.runtime.backends.runner import RunnerSession
            from pocketslm.runtime.bundle import open_bundle

            bundle = open_bundle(app.models.path(name), verify=False)
            graph = bundle.graph("native")
            session = RunnerSession(
                bundle.path / graph.file, 512, app.settings["threads"] or None, graph.kv_cache
            )
            try:
                times = session.bench(256, 48, 2)
            finally:
                session.close()
            yield {
                "prefill": 256e9 / min(times["prefill_ns"]),
                "decode": 48e9 / min(times["decode_ns"]),
            }

        def done(speeds: dict[str, float]) -> None:
            app.settings["measured"] = app.settings["measured"] | {name: speeds}
            self.refresh()

        app.start("engine", work, done)

    def remove(self, name: str) -> None:
        app = App.get_running_app()

        def really() -> None:
            if app.settings["model"] == name:
                app.unload()
                app.settings["model"] = ""
            others = [other for other in app.settings["embedders"] if other != name]
            app.settings["embedders"] = others
            app.models.remove(name)
            self.refresh()

        text = app.t("remove_model", name=name)
        confirm(app.t("remove"), text, app.t("remove"), app.t("cancel"), really, "danger")
