"""Adapters through the server: each request names its own, several at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ollama
import openai
import pytest
from adapter_support import factors, write_adapter
from server_support import HI, Running, serving

import support
from pocketslm.export.pipeline import export_bundle
from pocketslm.export.recipe import Recipe
from pocketslm.models.checkpoint import open_checkpoint
from pocketslm.runtime.model import Model
from pocketslm.runtime.server.line import Limits

NAMES = ("tiny", "tiny+polite", "tiny+terse")


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [
        write_adapter(folder / "polite"),
        write_adapter(folder / "terse", factors(seed=4, targets=("gate_proj", "down_proj"))),
    ]
    source = open_checkpoint(support.write_hf(folder / "hf"))
    recipe = Recipe(targets=("native", "onnx"))
    export_bundle(source, folder / "bundle", recipe, adapters=adapters)
    return folder / "bundle"


@pytest.fixture(scope="module")
def server(carried: Path) -> Iterator[Running]:
    yield from serving(Model.load(carried, "native", threads=1, parallel=2), Limits(waiting=12))


def test_a_request_names_its_adapter(server: Running, carried: Path) -> None:
    assert tuple(model.id for model in server.client.models.list()) == NAMES

    def asked(name: str) -> str | None:
        made = server.client.chat.completions.create(model=name, messages=HI, max_tokens=12)
        assert made.model == name
        return made.choices[0].message.content

    expected = []
    for adapter in (None, "polite", "terse"):
        with Model.load(carried, "native", adapter=adapter) as model:
            expected.append(model.reply(HI, max_new_tokens=12).text)
    assert len(set(expected)) == 3
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(asked, 4 * NAMES)) == 4 * expected
    with pytest.raises(openai.NotFoundError, match=r"'tiny\+rude'; there are: tiny, tiny\+polite"):
        asked("tiny+rude")


def test_ollama_s_clients_see_them(server: Running) -> None:
    client = ollama.Client(f"http://127.0.0.1:{server.port}")
    assert tuple(model.model for model in client.list().models) == NAMES
    made = client.chat("tiny+polite", HI, options={"num_predict": 12})
    client._client.close()
    assert made.message.content == server.model.reply(HI, adapter="polite", max_new_tokens=12).text


def test_a_backend_without_them_has_the_base_alone(carried: Path) -> None:
    for running in serving(Model.load(carried, "onnx"), Limits()):
        assert [model.id for model in running.client.models.list()] == ["tiny"]
