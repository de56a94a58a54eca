"""megatron-core loads as the libraries around it should: without torch's compiler, which nothing may ever call.

A dozen of its functions are decorated with `torch.compile`, which loads torch's compiler at once: two of the four
seconds that `import megatron.core` takes. Here they are compiled when first called.
"""

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class _Choice:
    """Whether functions run as they are written: one answer for the process."""

    uncompiled = False


def call_uncompiled(value: bool) -> None:
    """Have functions of megatron-core that are decorated with `torch.compile` run as they are written, or compiled.

    On a CPU compiling them takes longer than it saves.

    Args:
        value: Whether to leave the compiler out from now on.
    """
    _Choice.uncompiled = value


def is_uncompiled() -> bool:
    """Return whether they run as they are written."""
    return _Choice.uncompiled


def compile_when_called(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    """Return what takes the place of `torch.compile`, as a decorator with or without options.

    Args:
        compile_now: `torch.compile`.
    """

    def decorate(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:
            return functools.partial(decorate, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if _Choice.uncompiled:
                return function(*arguments, **named)
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*arguments, **named)

        return call

    return decorate


class _CoreLoader(importlib.abc.Loader):
    """Loads `megatron.core`, and all that it imports, with `torch.compile` put off."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import torch

        original = torch.compile
        torch.compile = compile_when_called(original)
        try:
            self._loader.exec_module(module)
        finally:
            torch.compile = original


class _CoreFinder(importlib.abc.MetaPathFinder):
    """Finds `megatron.core` as Python does, once, and has `_CoreLoader` load it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "megatron.core":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _CoreLoader(spec.loader)
        return spec


def load_without_compiler() -> None:
    """Have the next `import megatron.core` leave torch's compiler out, unless it is loaded already."""
    if "megatron.core" not in sys.modules:
        sys.meta_path.insert(0, _CoreFinder())
