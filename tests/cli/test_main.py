"""The dispatcher as users meet it: real processes for what is promised about time, streams and exit codes."""

import errno
import os
import subprocess
import sys

import pytest

from megatron_7b.cli import main as cli
from megatron_7b.cli.main import main
from megatron_7b.errors import CheckpointError, ConfigError, exit_code
from tests.support.assets import REPOSITORY

COMMANDS = [
    name for names in cli.COMMANDS.values() for name in names if (REPOSITORY / f"megatron_7b/cli/{name}.py").exists()
]


def run(*arguments, **options):
    command = [sys.executable, "-m", "megatron_7b", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=120, **options)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["help"]])
def test_the_overview_lists_every_command_with_its_summary(capsys, arguments):
    assert main(arguments) == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        line = next(line for line in overview.splitlines() if line.startswith(f"  {command} "))
        assert len(line.split(maxsplit=1)[1]) > 10, f"{command} has no SUMMARY"
    assert overview.index("preprocess") < overview.index("pretrain")


def test_unknown_commands_get_a_suggestion(capsys):
    assert main(["pretrian"]) == 2
    assert "unknown command 'pretrian'; did you mean pretrain?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("a", hint="b"), 2, "a\nhint: b"),
        (CheckpointError("a", hint="b"), 1, "a\nhint: b"),
        (OSError(errno.ENOSPC, "No space left", "R/x"), 1, "[Errno 28] No space left: 'R/x'\nhint: free some room"),
        (
            PermissionError(errno.EACCES, "Permission denied", "R/x"),
            2,
            "[Errno 13] Permission denied: 'R/x'\nhint: give",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "R/x"),
            2,
            "[Errno 30] Read-only file system: 'R/x'\nhint: give",
        ),
    ],
)
def test_what_a_user_can_mend_has_no_traceback(capsys, monkeypatch, error, code, said):
    def fail(_):
        raise error

    monkeypatch.setattr("megatron_7b.cli.commands.config.main", fail)
    assert main(["config"]) == code == exit_code(error)  # status.json tells the same
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_defects_keep_their_traceback(monkeypatch):
    def fail(_):
        raise ZeroDivisionError

    monkeypatch.setattr("megatron_7b.cli.commands.config.main", fail)
    with pytest.raises(ZeroDivisionError):
        main(["config"])


def test_interruption(capsys, monkeypatch):
    def fail(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_7b.cli.commands.config.main", fail)
    assert main(["config"]) == 130


def test_errors_go_to_stderr_and_decide_the_exit_code():
    result = run("config", "show", "tiny_gpu")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: unknown preset 'tiny_gpu'; did you mean tiny_cpu?")


def test_a_reader_that_leaves_is_no_traceback():
    command = f"{sys.executable} -m megatron_7b config show llama2_7b | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert result.stderr == ""
    assert result.stdout.startswith("# 6,738,415,616 parameters")


@pytest.mark.parametrize("command", [*COMMANDS, "data show", "convert to-hf", "convert from-hf"])
def test_help_answers_at_once_without_torch(command):
    """Under a second of processor time: what a loaded machine adds in waiting is not the command's."""
    program = (
        "import sys, time\nfrom megatron_7b.cli.main import main\n"
        f"try:\n    code = main([*{command.split()!r}, '--help'])\nexcept SystemExit as exit:\n    code = exit.code\n"
        "assert code in (0, None), code\n"
        "heavy = {'torch', 'transformers', 'megatron.core', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(time.process_time(), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "usage: megatron-7b" in result.stdout
    assert float(result.stderr.split()[-1]) < 1.0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_text_that_the_terminal_cannot_show_ends_nothing(tmp_path, encoding):
    (tmp_path / "c.jsonl").write_text('{"text": "国家"}\n', encoding="utf-8")
    flags = ["--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "c", "--tokenizer-model", "bytes"]
    assert main(["preprocess", *map(str, flags)]) == 0
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    result = run("data", "show", str(tmp_path / "c_text_document"), env=environment)
    assert result.returncode == 0, result.stderr
    assert "\\u56fd\\u5bb6" in result.stdout


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("megatron-7b 0.")


def test_remarks_of_libraries_are_left_out_and_others_are_not():
    code = r"""
import megatron_7b, warnings
for place in ("site-packages/megatron/core/x.py", "site-packages/transformer_engine/y.py", "somewhere/own.py"):
    compile("'\\d'", place, "exec")
warnings.warn_explicit("no jax", RuntimeWarning, "y.py", 1, module="transformer_engine.common")
warnings.warn_explicit("no numbers", RuntimeWarning, "z.py", 1, module="numpy")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert result.stderr.count("Warning: ") == 2
    assert "somewhere/own.py" in result.stderr
    assert "no numbers" in result.stderr


@pytest.mark.parametrize("environment", [{}, {"RANK": "0"}])
def test_a_rank_ends_without_the_end_of_the_interpreter(environment):
    """In which a thread of gloo's may end the process by SIGABRT, after all is done."""
    script = (
        "import atexit, sys; from megatron_7b.cli.main import main; atexit.register(print, 'ended'); sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--version"], capture_output=True, text=True, cwd=REPOSITORY,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert (done.returncode, "ended" in done.stdout) == (0, not environment), done.stderr
    assert done.stdout.startswith("megatron")
