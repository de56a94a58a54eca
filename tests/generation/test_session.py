"""Generation from Python: a session on a checkpoint, alone and on ranks."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_7b.cli.main import main
from megatron_7b.errors import ConfigError
from megatron_7b.generation import GenerationOptions, ScoreRequest, open_session
from megatron_7b.generation.setup import GenerationSettings
from megatron_7b.generation.stop_texts import StopTexts
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.ranks import run_ranks

PROMPTS = ["the cat sat", "12 o'clock", "on the mat, the"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    folder.mkdir()
    save_tiny_tokenizer(folder)
    save_tiny_model("llama", folder, vocab_size=300)
    (folder / "generation_config.json").write_text(json.dumps({"num_beams": 3, "length_penalty": 0.5}))
    output = folder.parent / "checkpoint"
    assert main(["convert", "from-hf", "--input", str(folder), "--output", str(output)]) == 0
    return output


def ways(checkpoint: Path, overrides: dict[str, object]) -> dict[str, Any]:
    """The same texts by every method."""
    greedy = GenerationOptions(temperature=0.0, max_new_tokens=8, ignore_eod=True)
    with open_session(checkpoint, overrides=overrides, max_batch_size=4) as session:
        texts = [sample.to_dict() for sample in session.generate(PROMPTS, greedy)]
        pieces = list(session.stream(PROMPTS, greedy))
        submitted = [session.submit(prompt, greedy)[0] for prompt in PROMPTS]
        given_up = session.submit(PROMPTS[0], greedy)[0]
        session.step()
        session.cancel(given_up)
        left = next(iter(session.stream(PROMPTS[0], greedy)))  # and no more of it
        num_pieces = sum(1 for _ in session.run())
        whole = texts[0]["text"]
        middle = whole[2:4]
        stopped = session.generate(PROMPTS, dataclasses.replace(greedy, stop=("no such text", middle)))
        with pytest.raises(ConfigError, match="stop is .* needs num_beams 1"):
            session.generate(PROMPTS, GenerationOptions(num_beams=2, stop=("x",)))
        scored = session.score(
            [ScoreRequest(session.encode(one).ids[:2], session.encode(one).ids[2:]) for one in PROMPTS]
        )
        found = session.generate(PROMPTS[0], GenerationOptions(max_new_tokens=8, num_return_sequences=2))
        drawn = session.generate(PROMPTS[0], GenerationOptions(max_new_tokens=8, top_k=5, num_return_sequences=3))
        with pytest.raises(ConfigError, match="cannot be streamed"):
            session.stream(PROMPTS[0])
        with pytest.raises(ConfigError, match="context is 256 tokens"):
            session.generate([PROMPTS[0], "the " * 300])
        return {
            "texts": texts,
            "streamed": ["".join(piece.text for piece in pieces if piece.sample.prompt.text == one) for one in PROMPTS],
            "submitted": [sample.to_dict() for sample in submitted],
            "given up": (len(given_up.token_ids), given_up.finish_reason, len(left.sample.token_ids), num_pieces),
            "stopped": [stopped[0].to_dict(), stopped[0].text == whole[: whole.find(middle)], len(stopped)],
            "scored": scored,
            "found": [sample.to_dict() for sample in found],
            "drawn": [sample.to_dict() for sample in drawn],
            "rest": session.step(),
        }


def test_every_way_gives_the_same_texts_at_every_layout(checkpoint: Path):
    (alone,) = run_ranks(1, ways, checkpoint, {})
    both = run_ranks(2, ways, checkpoint, {"parallel.tensor_model_parallel_size": 2})
    assert alone["streamed"] == [text["text"] for text in alone["texts"]]
    assert alone["submitted"] == alone["texts"]
    num_given, reason, num_left, num_pieces = alone["given up"]
    assert (num_given, reason) == (1, None)
    assert num_left >= 1
    assert 3 * 5 <= num_pieces <= 3 * 7
    assert alone["rest"] == []
    sample, is_cut, num_stopped = alone["stopped"]
    assert (sample["finish_reason"], is_cut, num_stopped) == ("stop", True, 3)
    assert len(sample["token_ids"]) < 8  # no more are computed
    assert [score.log_likelihood < 0 for score in alone["scored"]] == [True] * 3
    scores = [text["score"] for text in alone["found"]]  # the settings of its folder ask for beams
    assert scores == sorted(scores, reverse=True)
    assert len({text["text"] for text in alone["drawn"]}) == 3
    for rank in both:
        for name in ("texts", "streamed", "submitted", "stopped", "drawn"):
            assert rank[name] == alone[name]
        assert [text["token_ids"] for text in rank["found"]] == [text["token_ids"] for text in alone["found"]]


def test_more_ranks_than_a_copy_has_are_refused(checkpoint: Path):
    assert run_ranks(2, refusal, checkpoint) == ["2 ranks hold more than one copy of the model"] * 2


def refusal(checkpoint: Path) -> str:
    with pytest.raises(ConfigError) as caught, open_session(checkpoint):
        pass
    return str(caught.value.args[0])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_beams": 4, "temperature": 0.7, "top_p": 0.9}, "does not go with temperature 0.7, top_p 0.9"),
        ({"num_beams": 1, "length_penalty": 2.0}, "length_penalty needs num_beams above 1"),
        ({"temperature": 0.5, "early_stopping": True}, "early_stopping needs num_beams above 1"),
        ({"early_stopping": True}, "early_stopping needs num_beams above 1"),
        ({"num_return_sequences": 0, "max_new_tokens": 0}, "max_new_tokens is 0.*num_return_sequences is 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3, expected 1 to 2"),
    ],
)
def test_options_that_contradict_each_other_are_refused(fields: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        GenerationOptions(**fields).resolve(GenerationSettings())


def test_who_draws_wants_no_beams_of_the_settings():
    settings = GenerationSettings(defaults={"num_beams": 4, "temperature": 0.5, "length_penalty": 2.0})
    beams, applied = GenerationOptions().resolve(settings)
    assert repr(beams).startswith("BeamOptions(num_beams=4, length_penalty=2.0")
    assert applied == {"num_beams", "length_penalty"}
    drawn, applied = GenerationOptions(top_k=3).resolve(settings)
    assert repr(drawn).startswith("SamplingOptions(temperature=0.5, top_k=3")
    assert applied == {"temperature"}


def test_the_door_needs_no_torch():
    import subprocess

    script = "import sys, megatron_7b.generation.setup; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_texts_end_before_stop_texts_however_tokens_divide_them():
    for pieces in (["ab", "cST", "OPde"], list("abcSTOPde"), ["abcSTOPde"]):
        stop = StopTexts(["xyz", "STOP", "TOPd"])
        assert "".join(map(stop.add, pieces)) == "abc"
        assert stop.is_found
    stop = StopTexts(["STOP"])
    assert [stop.add("a S"), stop.add("T"), stop.add("x ST"), stop.finish()] == ["a ", "", "STx ", "ST"]
    assert not stop.is_found
