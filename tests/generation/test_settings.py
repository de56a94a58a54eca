"""generation_config.json: what is applied, what is told, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.errors import ConfigError
from megatron_7b.generation.settings import GenerationSettings, read_generation_settings


def read(folder: Path, **content: Any) -> GenerationSettings:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return read_generation_settings(folder)


@pytest.mark.parametrize(("ids", "ends"), [(None, set()), (7, {7}), ([7], {7}), ([7, 0, 9], {0, 7, 9}), ([], set())])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_texts_end_with_each_of_the_tokens(ids: object, ends: set[int], name: str, tmp_path: Path):
    (tmp_path / name).write_text(json.dumps({"eos_token_id": ids}))
    assert read_generation_settings(tmp_path).stop_ids == ends


def test_generation_config_goes_before_config(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert read(tmp_path, eos_token_id=2).stop_ids == {2}


def test_nothing_is_said_where_nothing_was_imported(tmp_path: Path):
    assert read_generation_settings(None) == read_generation_settings(tmp_path) == GenerationSettings()


def test_what_changes_something_is_applied_or_named(tmp_path: Path):
    settings = read(
        tmp_path,
        eos_token_id=1,
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        transformers_version="5",
        repetition_penalty=1.05,
        max_new_tokens=9,
        num_beams=1,
        no_repeat_ngram_size=3,
        min_p=0.1,
        num_return_sequences=1,
        length_penalty=1.0,
        suppress_tokens=None,
        output_scores=True,
        _from=1,
        forced_eos_token_id=[],
        max_length=20,
        early_stopping=False,
    )
    assert settings.defaults == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.05,
        "max_new_tokens": 9,
    }
    assert settings.not_applied == ("no_repeat_ngram_size 3", "min_p 0.1")
    line = "from generation_config.json: temperature 0.7, top_p 0.8; not applied: no_repeat_ngram_size 3, min_p 0.1"
    assert settings.describe({"temperature", "top_p"}) == line


def test_neutral_values_say_nothing(tmp_path: Path):
    settings = read(tmp_path, temperature=1.0, top_k=0, top_p=1, repetition_penalty=1.0, typical_p=1.0)
    assert not settings.defaults
    assert settings.describe(settings.defaults) is None


def test_beams_are_taken_over_unless_they_are_drawn(tmp_path: Path):
    fields: dict[str, Any] = {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"}
    settings = read(tmp_path, **fields, forced_eos_token_id=1)
    assert settings.defaults == fields
    assert settings.forced_last_id == 1
    assert not settings.not_applied
    assert settings.describe(fields) == (
        'from generation_config.json: num_beams 4, length_penalty 2, early_stopping "never"'
    )
    drawn = read(tmp_path, **fields, do_sample=True, forced_eos_token_id=[1, 2])
    assert not drawn.defaults
    assert drawn.not_applied == (
        "num_beams 4",
        "length_penalty 2.0",
        'early_stopping "never"',
        "forced_eos_token_id [1, 2]",
    )


def test_no_sampling_is_greedy(tmp_path: Path):
    assert read(tmp_path, do_sample=False, temperature=0.7).defaults == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "holds a list"),
        ('{"eos_token_id": "</s>"}', "eos_token_id in .* is '</s>', expected a token id or a list"),
        ('{"eos_token_id": [1, null]}', "eos_token_id in .* expected a token id or a list"),
        ('{"temperature": "hot"}', "temperature in .* is 'hot', expected a number"),
        ('{"early_stopping": "soon"}', "early_stopping in .* is 'soon', expected true, false or \"never\""),
    ],
)
def test_damaged_files_are_told(content: str, words: str, tmp_path: Path):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_generation_settings(tmp_path)
