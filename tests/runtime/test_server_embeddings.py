"""Embeddings over HTTP, in OpenAI's words and in Ollama's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import ollama
import openai
import pytest
from embedding_support import TEXTS, exported
from server_support import Running, serving

from pocketslm.models.config import Pooling
from pocketslm.runtime.model import Model
from pocketslm.runtime.server.line import Limits


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    pooling = Pooling("mean", normalize=True, max_tokens=32)
    bundle = exported(tmp_path_factory.mktemp("bert"), "bert", pooling)
    yield from serving(Model.load(bundle, "native", threads=1), Limits())


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[ollama.Client]:
    with ollama.Client(f"http://127.0.0.1:{server.port}") as client:
        yield client


def test_both_interfaces_give_what_the_model_gives(server: Running, client: ollama.Client) -> None:
    expected = server.model.embed(TEXTS)
    count = sum(map(len, server.model.tokens_to_embed(TEXTS)))
    theirs = server.client.embeddings.create(model="tiny", input=TEXTS)  # as base64
    np.testing.assert_array_equal(
        np.array([one.embedding for one in theirs.data], np.float32), expected
    )
    plain = server.client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    assert plain.data[2].embedding == pytest.approx(expected[2].tolist())
    made = client.embed("tiny", TEXTS)
    np.testing.assert_array_equal(np.array(made.embeddings, np.float32), expected)
    assert theirs.usage.prompt_tokens == made.prompt_eval_count == count
    one = client.embed("tiny:latest", TEXTS[0])
    np.testing.assert_array_equal(np.array(one.embeddings, np.float32), expected[:1])


def test_a_text_that_is_too_long_is_cut_where_that_is_asked_for(
    server: Running, client: ollama.Client
) -> None:
    long = "cat " * 40
    made = client.embed("tiny", long)
    np.testing.assert_array_equal(
        np.array(made.embeddings, np.float32), server.model.embed([long], truncate=True)
    )
    assert made.prompt_eval_count == 32
    with pytest.raises(ollama.ResponseError, match="the model reads 30 of a text"):
        client.embed("tiny", long, truncate=False)
    with pytest.raises(openai.BadRequestError, match="the model reads 30 of a text"):
        server.client.embeddings.create(model="tiny", input=long)
    for wrong in ("", []):
        with pytest.raises(ollama.ResponseError, match="'input' must be"):
            client.embed("tiny", wrong)


def test_who_waits_too_long_is_told(server: Running) -> None:
    for running in serving(server.model, Limits(seconds=0)):
        with pytest.raises(openai.APIStatusError, match="took too long") as late:
            running.client.embeddings.create(model="tiny", input="a")
        assert late.value.status_code == 504
