"""The document assistant as an app: Kivy, on a phone with no network and on the desktop.

``app`` starts it; ``screens`` are what a person sees, made of ``widgets`` and ``strings``;
``engine`` runs models off the UI thread; ``phone`` is what Android offers and what stands in for it
on a desktop; ``intents`` are actions that a model may propose; ``check`` and ``stage`` are for
packaging. Nothing of the runtime imports this.
"""
