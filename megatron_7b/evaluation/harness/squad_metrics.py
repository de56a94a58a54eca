"""What tasks of the harness import from transformers to compare answers, which transformers 5 no longer has.

`record`, `coqa`, `xquad` and others do `import transformers.data.metrics.squad_metrics`, and do not load without it.
"""

import importlib.util
import sys
import types

from megatron_7b.evaluation.labelled.measures import answer_f1, normalize_answer

_PACKAGE = "transformers.data.metrics"


def provide_squad_metrics() -> None:
    """Have the module be there for the rest of the process, unless transformers has it."""
    import transformers.data

    if _PACKAGE in sys.modules or importlib.util.find_spec(_PACKAGE) is not None:
        return
    package, module = (types.ModuleType(name, __doc__) for name in (_PACKAGE, f"{_PACKAGE}.squad_metrics"))
    names = {"compute_exact": _is_same, "compute_f1": answer_f1, "normalize_answer": normalize_answer}
    vars(module).update(names)
    vars(package).update(squad_metrics=module, __path__=[])
    vars(transformers.data).update(metrics=package)
    sys.modules |= {package.__name__: package, module.__name__: module}


def _is_same(right: str, found: str) -> int:
    return int(normalize_answer(right) == normalize_answer(found))
