"""Who says what, and where: the main rank, the others, and the log file."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, sys, warnings
from pathlib import Path
from megatron_7b.runtime.logs import add_log_file, configure_logging, remove_log_file
configure_logging(int(sys.argv[1]))
configure_logging(int(sys.argv[1]))  # once more: nothing is said twice
handler = add_log_file(Path(sys.argv[2]))
logger = logging.getLogger("megatron_7b.training.loop")
logger.debug("a detail")
logger.info("a step")
logger.warning("a worry")
warnings.warn("a library's warning")
logging.getLogger("another.library").info("not ours")
remove_log_file(handler)
logger.info("after the file")
print("a result")
"""


def run(rank: int, log: Path) -> "subprocess.CompletedProcess[str]":
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(rank), str(log)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def test_the_main_rank_speaks_on_stderr_and_results_have_stdout_to_themselves(tmp_path: Path) -> None:
    result = run(0, tmp_path / "train.log")
    assert result.stdout == "a result\n"
    lines = result.stderr.splitlines()
    assert [line.split(" ", 2)[2].split()[0] for line in lines[:2]] == ["INFO", "WARNING"]
    assert [line for line in lines if line.endswith("a step")] == lines[:1]
    assert "a library's warning" in result.stderr
    assert lines[-1].endswith("after the file")
    assert "a detail" not in result.stderr
    assert "not ours" not in result.stderr


def test_the_log_file_takes_details_as_well(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("an earlier start\n")
    run(0, log)
    text = log.read_text()
    assert text.startswith("an earlier start\n")
    assert text.count("a detail") == text.count("a step") == text.count("a worry") == 1
    assert "after the file" not in text


def test_other_ranks_only_speak_when_something_is_wrong(tmp_path: Path) -> None:
    result = run(3, tmp_path / "train.log")
    assert "a step" not in result.stderr
    assert "[rank 3] a worry" in result.stderr
