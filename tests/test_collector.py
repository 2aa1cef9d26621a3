"""Python's collector of garbage rests, and works again as it did before."""

from __future__ import annotations

import gc

import pytest

from pocketslm.collector import no_collection
from pocketslm.errors import TokenizerError
from pocketslm.runtime.tokenizer import load_tokenizer_files


def test_it_rests_for_as_long_as_asked() -> None:
    with no_collection():
        assert not gc.isenabled()
        with no_collection():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_tokenizer_that_cannot_be_read_leaves_it_on() -> None:
    with pytest.raises(TokenizerError):
        load_tokenizer_files({"tokenizer.json": "{"})
    assert gc.isenabled()
