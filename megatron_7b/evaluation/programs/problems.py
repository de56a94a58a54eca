"""Problems whose solutions are programs, in the formats of HumanEval and MBPP."""

import ast
import builtins
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_7b.data.records.reading import RecordError, read_records, text_of
from megatron_7b.runtime.confinement.running import ProgramTests

EXAMPLE = '{"task_id": "HumanEval/0", "prompt": "def f(x):\\n", "entry_point": "f", "test": "def check(candidate): …"}'
_ENDS_OF_FUNCTION = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n```")
_ENDS_OF_PROGRAM = ("\nassert ", '\n"""', "\nprint(", "\nif __name__", "\n```")


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        task_id: What it is called.
        prompt: What a model continues.
        head: What of the prompt is part of the program: HumanEval's is the beginning of a function, MBPP's only speaks
            of it.
        stop: Texts that end a program.
        tests: What judges it.
        solution: A program that is right, if the file has one.
    """

    task_id: str
    prompt: str
    head: str
    stop: tuple[str, ...]
    tests: ProgramTests
    solution: str | None

    def program(self, completion: str) -> str:
        """Return the program that a model has written."""
        return self.head + completion


def holds_problems(file: Path) -> bool:
    """Whether the first record of a JSONL file is a problem."""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            record = json.loads(next(line for line in stream if line.strip()))
    except (OSError, ValueError, StopIteration):
        return False
    return isinstance(record, dict) and ("test_list" in record or {"entry_point", "test", "prompt"} <= record.keys())


def read_problems(file: Path, limit: int | None = None) -> list[Problem]:
    """Read a JSONL file of problems.

    Args:
        file: Records like those of HumanEval (task_id, prompt, entry_point, test) or MBPP (task_id, text, test_list).
        limit: Only so many.

    Raises:
        DataFormatError: A record is neither, its tests are no Python, or two have the same task_id.
    """
    seen: set[str] = set()

    def use(record: dict[str, Any]) -> Problem:
        problem = _mbpp(record) if "test_list" in record else _human_eval(record)
        if problem.task_id in seen:
            raise RecordError(f"task_id {problem.task_id!r} was there before")
        seen.add(problem.task_id)
        return problem

    return [problem for _, problem in read_records(file, use, name="problems", example=EXAMPLE)][:limit]


def _human_eval(record: dict[str, Any]) -> Problem:
    prompt, entry = text_of(record, "prompt"), text_of(record, "entry_point")
    tests = f"{text_of(record, 'test')}\ncheck({entry})\n"
    names_used([tests], "test")  # refuses what is no Python
    return Problem(
        task_id=_task_id(record),
        prompt=prompt,
        head=prompt,
        stop=_ENDS_OF_FUNCTION,
        # Functions that a prompt has complete are the problem's: tests may use them.
        tests=ProgramTests(tests, (entry,), prelude=prompt if _is_python(prompt) else ""),
        solution=_optional(record, "canonical_solution"),
    )


def _mbpp(record: dict[str, Any]) -> Problem:
    description = text_of(record, "text" if "text" in record else "prompt").strip()
    asserts = record["test_list"]
    if not isinstance(asserts, list) or not asserts or not all(isinstance(one, str) for one in asserts):
        raise RecordError(f"'test_list' is {str(asserts)[:60]!r}, expected a list of texts, at least one")
    imports = record.get("test_imports") or []
    setup = "\n".join([*imports, _optional(record, "test_setup_code") or ""])
    return Problem(
        task_id=_task_id(record),
        prompt='"""\n' + "\n".join([description, *asserts]) + '\n"""\n',
        head="",
        stop=_ENDS_OF_PROGRAM,
        tests=ProgramTests("\n".join(asserts), names_used([*asserts], "test_list", defined_by=setup), prelude=setup),
        solution=_optional(record, "code"),
    )


def names_used(tests: list[str], key: str, defined_by: str = "") -> tuple[str, ...]:
    """Return what tests take from the program: names that neither they nor Python define.

    Args:
        tests: Python source.
        key: Of the record, for messages.
        defined_by: Python source that comes before them.

    Raises:
        RecordError: They are no Python.
    """
    try:
        trees = [ast.parse(code) for code in (defined_by, *tests)]
    except (SyntaxError, ValueError) as error:
        raise RecordError(f"{key!r} is no Python: {error}") from None
    used: set[str] = set()
    defined = set(dir(builtins))
    for node in (node for tree in trees for node in ast.walk(tree)):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                defined |= {(alias.asname or alias.name).partition(".")[0] for alias in aliases}
            case ast.ExceptHandler(name=str(name)):
                defined.add(name)
    return tuple(sorted(used - defined))


def _task_id(record: dict[str, Any]) -> str:
    value = record.get("task_id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text_of(record, "task_id")


def _optional(record: dict[str, Any], key: str) -> str | None:
    return text_of(record, key, may_be_empty=True) if record.get(key) is not None else None


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True
