"""Who says what, and where: the main rank, the others, and the log file."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, sys, warnings
from pathlib import Path
from megatron_7b.runtime.process.logs import add_log_file, configure_logging, remove_log_file
configure_logging(int(sys.argv[1]))
configure_logging(int(sys.argv[1]))  # once more: nothing is said twice
logger = logging.getLogger("megatron_7b.training.loop")
logger.info("before the file")
handler = add_log_file(Path(sys.argv[2]))
logger.debug("a detail")
logger.info("a step")
logger.warning("a worry")
warnings.warn("a library's warning", stacklevel=1)
logging.getLogger("another.library").warning("not ours")
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
    words = [line.split(None, 2)[2] for line in result.stderr.splitlines()]
    assert words == [
        "INFO    before the file",
        "INFO    a step",
        "WARNING a worry",
        "INFO    after the file",
    ]


def test_the_log_file_takes_details_and_what_libraries_say(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("an earlier start\n")
    run(0, log)
    text = log.read_text()
    assert text.startswith("an earlier start\n")
    for said in ("before the file", "a detail", "a step", "a worry", "a library's warning", "not ours"):
        assert text.count(said) == 1, said
    assert "after the file" not in text


def test_other_ranks_only_speak_when_something_is_wrong(tmp_path: Path) -> None:
    stderr = run(3, tmp_path / "train.log").stderr
    assert stderr.endswith(" WARNING [rank 3] a worry\n")
    assert stderr.count("\n") == 1


def test_a_log_file_on_a_full_disk_is_mentioned_once(tmp_path: Path) -> None:
    result = run(0, Path("/dev/full"))
    assert result.stdout == "a result\n"
    assert result.stderr.count("lines are missing from /dev/full: No space left on device\n") == 1
    assert "Traceback" not in result.stderr
    assert "a step" in result.stderr
