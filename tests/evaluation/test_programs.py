"""pass@k of programs that a checkpoint writes: the estimate, the formats, and the command."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_7b.errors import ConfigError, DataFormatError
from megatron_7b.evaluation.programs import estimate_pass_at_k
from megatron_7b.evaluation.programs.evaluating import ProgramOptions, ProgramResults, Sample, judge_programs
from megatron_7b.evaluation.programs.problems import holds_problems, read_problems
from megatron_7b.runtime.confinement.running import Limits, Verdict
from tests.conversion.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.support.commands import run_command
from tests.support.small_disk import small_disk

HUMAN_EVAL = {
    "task_id": "Made/0",
    "prompt": 'import math\n\ndef double(x):\n    return 2 * x\n\ndef half(x):\n    """Half of x."""\n',
    "entry_point": "half",
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    for n in range(5):\n        assert math.isclose(candidate(double(n)), n)\n",
}
MBPP = {
    "task_id": 7,
    "text": "Write a function that sorts a list in place and returns the largest of two Boxes.",
    "code": "class Box:\n    def __init__(self, a):\n        self.a = a\ndef order(a):\n    a.sort()\n"
    "def larger(a, b):\n    return max(a.a, b.a)\ndef count():\n    yield from range(3)\n",
    "test_setup_code": "data = [3, 1, 2]",
    "test_list": [
        "order(data)\nassert data == [1, 2, 3]",
        "assert larger(Box(1), Box(4)) == 4 and Box(2).a == 2",
        "assert list(count()) == [0, 1, 2]",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("programs")
    save_tiny_model("llama", path / "hf", vocab_size=300)
    save_tiny_tokenizer(path / "hf")
    assert run_command("convert", "from-hf", "--input", path / "hf", "--output", path / "checkpoint").returncode == 0
    write(path / "problems.jsonl", HUMAN_EVAL, MBPP)
    return path


def write(file: Path, *records: object) -> Path:
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    return file


def human_evals_estimate(n: int, c: int, k: int) -> float:
    """The formula of the package human-eval, which multiplies in place of counting."""
    return 1.0 if n - c < k else float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def test_estimates_are_those_of_human_eval() -> None:
    for n in (1, 2, 7, 20, 200):
        for c in range(0, n + 1, max(1, n // 10)):
            for k in {1, min(2, n), min(10, n), n}:
                assert estimate_pass_at_k(n, c, k) == pytest.approx(human_evals_estimate(n, c, k), abs=1e-12)
    with pytest.raises(ValueError, match="pass@3"):
        estimate_pass_at_k(2, 1, 3)


def test_the_mean_is_over_problems(folder: Path) -> None:
    problems = read_problems(folder / "problems.jsonl")
    right = {problems[0].task_id: 3, problems[1].task_id: 1}
    samples = [
        Sample(problem, "", Verdict(number < right[problem.task_id], "")) for problem in problems for number in range(4)
    ]
    results = ProgramResults(tuple(samples), (1, 2), 0.0, 0.0)
    assert results.counts == {"Made/0": (4, 3), "7": (4, 1)}
    assert results.measures() == pytest.approx({"pass@1": (3 / 4 + 1 / 4) / 2, "pass@2": (1 + 1 / 2) / 2})
    assert results.interval(1) == pytest.approx((0.25, 0.75))


def test_solutions_of_both_formats_pass_and_others_do_not(folder: Path) -> None:
    """Tests use functions of the prompt, change arguments in place, and hand objects of the program back to it."""
    one, other = read_problems(folder / "problems.jsonl")
    assert (one.prompt, one.tests.names) == (HUMAN_EVAL["prompt"], ("half",))
    assert other.tests.names == ("Box", "count", "larger", "order")
    assert other.prompt.startswith('"""\nWrite a function')
    assert "assert larger" in other.prompt
    assert one.solution is not None
    assert other.solution is not None
    given = [
        (one, one.solution),
        (other, other.solution),
        (one, "    return x // 3\n"),
        (other, other.solution.replace("max", "min")),
        (other, other.solution.replace("a.sort()", "pass")),
        (other, other.solution.replace("def larger", "def smaller")),
    ]
    verdicts = judge_programs(given, Limits(seconds=20))
    assert [one.passed for one in verdicts] == [True, True, False, False, False, False]
    assert "NameError: name 'larger' is not defined" in verdicts[-1].result


def test_what_is_no_problem_is_refused(folder: Path, tmp_path: Path) -> None:
    assert holds_problems(folder / "problems.jsonl")
    assert not holds_problems(write(tmp_path / "texts.jsonl", {"text": "a"}))
    broken = [{**HUMAN_EVAL, "test": "def check("}, HUMAN_EVAL, HUMAN_EVAL, {**MBPP, "test_list": []}]
    with pytest.raises(DataFormatError) as caught:
        read_problems(write(tmp_path / "broken.jsonl", *broken))
    for words in ("3 of 4", "broken.jsonl:1: 'test' is no Python", "'Made/0' was there before", "at least one"):
        assert words in str(caught.value)
    with pytest.raises(ConfigError, match="pass@10 cannot be estimated from 3 samples"):
        ProgramOptions(pass_at=(1, 10), num_samples=3)
    with pytest.raises(ConfigError, match="at temperature 0"):
        ProgramOptions(pass_at=(2,), temperature=0.0)


def test_the_command_asks_before_it_runs_anything(folder: Path) -> None:
    done = run_command("evaluate", "--checkpoint", folder / "checkpoint", "--data", folder / "problems.jsonl")
    assert done.returncode == 2
    assert "nobody has read these" in done.stderr
    assert "--allow-code-execution" in done.stderr


def test_what_took_long_outlives_a_full_disk(folder: Path, tmp_path: Path) -> None:
    """Figures are printed in any case, and texts and programs are in another place."""
    asked = write(tmp_path / "asked.jsonl", *({"source": f"cat {one}", "target": "x"} for one in range(3)))
    kinds: list[tuple[tuple[object, ...], str, str]] = [
        (("--data", asked, "--task", "sequence_to_sequence"), "3 texts", "prediction"),
        (("--data", folder / "problems.jsonl", "--allow-code-execution"), "2 problems", "results"),
    ]
    with small_disk(tmp_path / "disk", 4) as disk:
        (disk / "full").write_bytes(b"x" * 4096)
        for words, figures, key in kinds:
            done = run_command(
                "evaluate", "--checkpoint", folder / "checkpoint", *words, "--output", disk / "found.json",
                "--max-new-tokens", 4, "--runtime.num-threads", 1,
            )  # fmt: skip
            assert done.returncode == 1
            assert figures in done.stdout
            told = re.search(r"found.json cannot be written: No space .*; it is in (\S+) instead", done.stderr)
            assert told is not None, done.stderr
            assert f'"{key}"' in Path(told[1]).read_text()
            shutil.rmtree(Path(told[1]).parent)


def test_the_command_writes_figures_and_programs(folder: Path, tmp_path: Path) -> None:
    """Of a model that has learnt nothing, on one rank and on two copies."""
    files = []
    for ranks in (1, 2):
        files.append(tmp_path / f"{ranks}.json")
        done = run_command(
            "evaluate", "--checkpoint", folder / "checkpoint", "--data", folder / "problems.jsonl", "--pass-at", "1,2",
            "--num-samples", 3, "--max-new-tokens", 12, "--allow-code-execution", "--output", files[-1], "--json",
            "--nproc", ranks, "--runtime.num-threads", 1,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1]) == {
            "pass@1": 0.0, "pass@2": 0.0, "problems": 2, "programs": 6,
        }  # fmt: skip
    samples = [file.with_suffix(".samples.jsonl").read_text() for file in files]
    assert samples[0] == samples[1]
    records = [json.loads(line) for line in samples[0].splitlines()]
    assert [one["task_id"] for one in records] == ["Made/0"] * 3 + ["7"] * 3
    assert len({one["completion"] for one in records}) > 2
    assert all(one["result"].startswith("failed: ") for one in records)
    content = json.loads(files[0].read_text())
    assert content["results"] == {
        "problems": {
            "pass@1,none": 0.0, "pass@1_stderr,none": 0.0, "pass@2,none": 0.0, "pass@2_stderr,none": 0.0,
        }
    }  # fmt: skip
    assert content["problems"]["7"] == {"programs": 3, "right": 0}
    assert "evaluate --checkpoint" in content["command"]
    compared = run_command("compare", *files)
    assert compared.returncode == 0, compared.stderr
    assert "pass@1" in compared.stdout
