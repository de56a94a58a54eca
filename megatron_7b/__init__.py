"""megatron_7b: from raw text to a trained language model and back to text, on a laptop CPU and on a cluster of GPUs.

Packages are the doors: `docs/python_api.md` lists the function of each command. Importing this package loads
neither torch nor megatron-core.
"""

import logging
import warnings

from megatron_7b import core_import

__version__ = "0.2.0"


def _quiet_libraries() -> None:
    """Leave out remarks of libraries as they load (no GPU, no apex, deprecations to come): users can do nothing here.

    Commands and Python users get the same: it has to be done before the first import that loads one of them.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch)\.")
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"transformer_engine(\.|$)")
    # Python names a file, not a module, when it compiles one for the first time.
    warnings.filterwarnings("ignore", category=SyntaxWarning, module=r".*[/\\](megatron|transformer_engine)[/\\]")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)


_quiet_libraries()
core_import.load_without_compiler()
