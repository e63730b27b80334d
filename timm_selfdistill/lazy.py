"""Import a package's public names when they are first used, and register our networks with timm when it is imported.

What an extra of this package installs may be missing; `needs_extra` then says which one.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

# Each extra of pyproject.toml that users choose, and the modules that it brings.
_EXTRAS: Final = {
    "train": ("accelerate", "datasets", "evaluate", "matplotlib", "pyarrow", "scipy"),
    "torchdistill": ("torchdistill",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
}


class MissingExtraError(ModuleNotFoundError):
    """A module is missing that an extra of this package installs."""


@contextmanager
def needs_extra(what: str) -> Iterator[None]:
    """Where the body misses a module that an extra installs, say what needs it, and how to install it.

    Raises:
        MissingExtraError: In place of the ModuleNotFoundError of such a module.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        for extra, modules in _EXTRAS.items():
            if module in modules:
                raise MissingExtraError(
                    f"{what} needs {module}, which is not installed: pip install 'timm_selfdistill[{extra}]'.",
                    name=module,
                ) from error
        raise


def attach(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` (PEP 562) of a package whose public names are in its stub.

    The stub, `__init__.pyi`, holds lines `from MODULE import NAME as NAME`, which type checkers and editors read too.
    """
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    modules = {alias.name: str(node.module) for node in imports for alias in node.names}

    def get(name: str) -> Any:
        if name in modules:
            with needs_extra(f"{package}.{name}"):
                module = import_module(modules[name])
                # A subpackage of that name can be called (`make_callable`), and is what an import statement gives.
                value = module if module.__name__ == f"{package}.{name}" else getattr(module, name)
            setattr(sys.modules[package], name, value)
            return value
        if name.startswith("_") or find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return import_module(f"{package}.{name}")

    names = sorted(modules)
    return get, lambda: sorted({*vars(sys.modules[package]), *names}), names


def make_callable(package: str, name: str) -> None:
    """Let a package be called as its public function of this name, under which it stands in the package around it."""
    sys.modules[package].__class__ = type("_CallableModule", (_CallableModule,), {"function": name})


class _CallableModule(ModuleType):
    function: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with needs_extra(self.__name__):
            function = getattr(self, self.function)
        return function(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return import_module, (self.__name__,)


def import_after(name: str, then: str) -> None:
    """Import the module `then` as soon as the package `name` is imported: now, or later by whoever does so."""
    if name in sys.modules:
        import_module(then)
    else:
        sys.meta_path.insert(0, _After(name, then))


class _After(MetaPathFinder):
    def __init__(self, name: str, then: str) -> None:
        self.name, self.then = name, then

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader  # of this spec only
            execute = loader.exec_module

            def execute_and_import(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                import_module(self.then)

            loader.exec_module = execute_and_import
        return spec
