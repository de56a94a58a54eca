"""Try the imports that are slow or may crash, in a process of their own, so that a crash is a finding."""

import json
import subprocess
import sys
from dataclasses import dataclass, field

MODULES = (
    "torch",
    "megatron.core",
    "megatron_7b.data._index",
    "megatron_7b.runtime._kernels",
    "transformer_engine.pytorch",
    "apex.multi_tensor_apply",
)

# torch comes first: Transformer Engine does not find libnccl without it. Each answer is written as soon as it is known,
# so that those before a crash are kept.
_PROBE = """
import importlib, importlib.util, json, sys
def facts(name, module):
    found = {"version": getattr(module, "__version__", ""), "file": getattr(module, "__file__", "")}
    if name == "torch":
        found["cuda"] = module.version.cuda
        if module.cuda.is_available():
            found["devices"] = [
                f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}"
                for p in map(module.cuda.get_device_properties, range(module.cuda.device_count()))
            ]
    if name.startswith("transformer_engine"):
        found["version"] = getattr(sys.modules["transformer_engine"], "__version__", "")
    return found
for name in sys.argv[1:]:
    answer = {"name": name, "found": True, "error": None, "facts": {}}
    try:
        answer["found"] = importlib.util.find_spec(name) is not None
        if answer["found"]:
            answer["facts"] = facts(name, importlib.import_module(name))
        else:
            answer["error"] = "not installed"
    except ModuleNotFoundError as error:
        answer["found"] = not name.startswith(str(error.name))
        answer["error"] = str(error)
    except BaseException as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """What came of one import."""

    found: bool
    """Whether the module is installed."""
    error: str | None
    """Why it cannot be imported; None where it can."""
    facts: dict[str, object] = field(default_factory=dict)


def probe_imports(timeout_seconds: float, modules: tuple[str, ...] = MODULES) -> dict[str, Outcome]:
    """Import `modules` in turn in a subprocess.

    Returns:
        One outcome per module, in order. After a crash or the time limit the module concerned has that as its error,
        and the ones after it are tried again without it.
    """
    outcomes: dict[str, Outcome] = {}
    remaining = list(modules)
    while remaining:
        answers, ending = _run(remaining, timeout_seconds)
        outcomes.update(answers)
        remaining = [name for name in remaining if name not in answers]
        if remaining:
            outcomes[remaining.pop(0)] = Outcome(found=True, error=f"the import {ending}")
    return {name: outcomes[name] for name in modules}


def _run(modules: list[str], timeout_seconds: float) -> tuple[dict[str, Outcome], str]:
    command = [sys.executable, "-c", _PROBE, *modules]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_seconds)
        output, ending = result.stdout, f"ended the process with code {result.returncode}"
    except subprocess.TimeoutExpired as expired:
        raw: object = expired.stdout  # Bytes, whatever text= says, or None.
        output = raw.decode() if isinstance(raw, bytes) else ""
        ending = f"took more than {timeout_seconds:g} seconds"
    answers: dict[str, Outcome] = {}
    for line in output.splitlines():
        if line.startswith('{"name"'):
            answer = json.loads(line)
            answers[answer["name"]] = Outcome(answer["found"], answer["error"], answer["facts"])
    return answers, ending
