"""The scale of a model of embeddings: what its cosines are worth, and which languages it knows.

Cosines of models differ: to multilingual-e5 unrelated texts have a cosine of 0.75, to MiniLM 0.1.
So a few questions on one matter and sentences, each of which answers one of them without a word in
common, are embedded once for a model. Mean and spread of the cosines of those that do not
belong together bring all of its cosines to one scale; whether the right ones are found says whether
it knows a language.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Protocol

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float32]

# Mean and spread of the likeness of texts on one matter that do not belong together: of
# all-MiniLM-L6-v2, in whose cosines the constants of `quoting` and `retrieval` were chosen.
UNRELATED, SPREAD = 0.080, 0.076
# The part of a language's questions that must find their sentence among all of it.
FOUND = 0.5
_LEAST_SPREAD = 1e-3  # of a model that tells nothing apart
_PAIRS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "en": (
        ("What do children pay?", "Guests under twelve stay free of charge."),
        ("May I bring my dog?", "Pets are welcome in all rooms."),
        ("How far is the lake?", "The water can be reached on foot in twenty minutes."),
        ("When is breakfast?", "The morning meal is served from seven to ten."),
        ("Can I cancel?", "You get your money back until three days before arrival."),
        ("Where do I park?", "Cars stand in the yard behind the building."),
        ("Who gives me the key?", "The landlady will let you in at the door."),
        ("Is there internet?", "A wireless network covers the whole house."),
    ),
    "de": (
        ("Was zahlen Kinder?", "Gäste unter zwölf Jahren wohnen kostenlos."),
        ("Darf mein Hund mitkommen?", "Haustiere sind in allen Zimmern willkommen."),
        ("Wie weit ist der See entfernt?", "Zum Wasser läuft man zwanzig Minuten."),
        ("Wann gibt es Frühstück?", "Morgens decken wir den Tisch von sieben bis zehn Uhr."),
        ("Kann ich stornieren?", "Bis drei Tage vor der Anreise bekommen Sie Ihr Geld zurück."),
        ("Wo parke ich?", "Autos stehen im Hof hinter dem Haus."),
        ("Wer gibt mir den Schlüssel?", "Die Wirtin lässt Sie an der Tür ein."),
        ("Habt ihr Internet?", "Ein WLAN reicht über alle Stockwerke."),
    ),
    "fr": (
        ("Combien paient les enfants ?", "Les hôtes de moins de douze ans logent gratuitement."),
        ("Mon chien peut-il venir ?", "Les animaux sont admis dans toutes les chambres."),
        ("À quelle distance se trouve le lac ?", "On rejoint l'eau en vingt minutes à pied."),
        ("Quand est le petit déjeuner ?", "Le repas du matin est servi de sept à dix heures."),
        ("Puis-je annuler ?", "Vous êtes remboursé jusqu'à trois jours avant l'arrivée."),
        ("Où puis-je me garer ?", "Les voitures restent dans la cour derrière le bâtiment."),
        ("Qui me donne la clé ?", "La propriétaire vous fait entrer."),
        ("Y a-t-il internet ?", "Un réseau sans fil couvre toute la maison."),
    ),
    "es": (
        ("¿Cuánto pagan los niños?", "Los huéspedes menores de doce años se alojan gratis."),
        ("¿Puede venir mi perro?", "Se admiten mascotas en todas las habitaciones."),
        ("¿A qué distancia está el lago?", "Se llega al agua en veinte minutos a pie."),
        ("¿Cuándo es el desayuno?", "Por la mañana servimos la mesa de siete a diez."),
        ("¿Puedo cancelar?", "Se devuelve el dinero hasta tres días antes de la llegada."),
        ("¿Dónde aparco?", "Los coches se dejan en el patio detrás del edificio."),
        ("¿Quién me da la llave?", "La dueña le abre la puerta."),
        ("¿Hay internet?", "Una red inalámbrica cubre toda la casa."),
    ),
    "ar": (
        ("كم يدفع الأطفال؟", "يقيم الضيوف دون الثانية عشرة مجانا."),
        ("هل يمكنني إحضار كلبي؟", "الحيوانات الأليفة مرحب بها في جميع الغرف."),
        ("كم تبعد البحيرة؟", "يصل المرء إلى الماء مشيا في عشرين دقيقة."),
        ("متى وقت الفطور؟", "تقدم وجبة الصباح من السابعة إلى العاشرة."),
        ("هل يمكنني إلغاء الحجز؟", "تستردون نقودكم حتى ثلاثة أيام قبل الوصول."),
        ("أين أوقف سيارتي؟", "تترك المركبات في الفناء خلف المبنى."),
        ("من يعطيني المفتاح؟", "صاحبة البيت تفتح لكم الباب."),
        ("هل يوجد إنترنت؟", "تغطي شبكة لاسلكية البيت كله."),
    ),
    "zh": (
        ("小孩要付多少钱？", "十二岁以下的客人免费入住。"),
        ("可以带狗吗？", "所有房间都欢迎宠物。"),
        ("湖有多远？", "步行二十分钟就到水边。"),
        ("早餐是几点？", "早上七点到十点供应餐点。"),
        ("能取消吗？", "入住前三天可以退款。"),
        ("在哪里停车？", "车辆放在楼后的院子里。"),
        ("谁给我钥匙？", "房东会为您开门。"),
        ("有网络吗？", "全屋都有无线信号。"),
    ),
}


class Embedder(Protocol):
    """Such as `Model` of an embedding bundle."""

    @property
    def name(self) -> str: ...

    @property
    def embedding_prompts(self) -> Mapping[str, str]: ...

    def embed(
        self, texts: Sequence[str], *, prompt: str | None = None, truncate: bool = False
    ) -> Vector: ...


@dataclass(frozen=True)
class Scale:
    """- ``unrelated``: for each language, the mean cosine of a question and a sentence that do not
      belong together.
    - ``spread``: their deviation from it.
    - ``languages``: those that the model knows.
    """

    unrelated: Mapping[str, float]
    spread: float
    languages: tuple[str, ...]

    def likeness(self, cosines: Vector, language: str = "en") -> Vector:
        """Cosines of questions to texts of a language, brought to the scale of all models."""
        mean = self.unrelated[language if language in self.languages else "en"]
        factor = np.float32(SPREAD / self.spread)
        found: Vector = np.float32(UNRELATED) + (cosines - np.float32(mean)) * factor
        return found

    def knows(self, language: str) -> bool:
        """Whether the model knows a document's language; "" are tables, logs and code."""
        return (language or "en") in self.languages


def write_scales(scales: Iterable[Scale]) -> str:
    return json.dumps([asdict(scale) for scale in scales])


def read_scales(text: str) -> list[Scale]:
    return [
        Scale(data["unrelated"], data["spread"], tuple(data["languages"]))
        for data in json.loads(text)
    ]


def as_questions(embedder: Embedder, texts: Sequence[str]) -> Vector:
    return embedder.embed(texts, prompt=_prompt(embedder, "query"), truncate=True)


def as_passages(embedder: Embedder, texts: Sequence[str]) -> Vector:
    return embedder.embed(texts, prompt=_prompt(embedder, "passage", "document"), truncate=True)


def _prompt(embedder: Embedder, *names: str) -> str | None:
    return next((name for name in names if name in embedder.embedding_prompts), None)


def pairs(*languages: str) -> list[tuple[str, str]]:
    """The questions and sentences of some languages that `measured` has a model read."""
    return [pair for language in languages for pair in _PAIRS[language]]


def measured(embedder: Embedder) -> Scale:
    """The scale of a model, for which it reads 96 short texts."""
    unrelated, spreads = {}, {}
    languages = []
    for language in _PAIRS:
        asked = as_questions(embedder, [question for question, _ in pairs(language)])
        said = as_passages(embedder, [sentence for _, sentence in pairs(language)])
        cosines = asked @ said.T
        others = cosines[~np.eye(len(cosines), dtype=bool)]
        unrelated[language], spreads[language] = float(others.mean()), float(others.std())
        if (cosines.argmax(1) == np.arange(len(cosines))).mean() >= FOUND:
            languages.append(language)
    spread = fmean(spreads[language] for language in languages or spreads)
    return Scale(unrelated, max(spread, _LEAST_SPREAD), tuple(languages))
