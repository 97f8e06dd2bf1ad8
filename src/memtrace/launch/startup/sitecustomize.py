"""What Python runs at the start of each process under `memtrace run`: from here on it waits for what trains.

Python's own `site` module imports it, since its directory is the first on PYTHONPATH, in the script's process and in
those that the script starts. It takes the directory off `sys.path` again, puts one finder before all others, and hands
over to the `sitecustomize` that Python would have found without it. The finder finds nothing by itself: it has
the others find a module that is awaited, and calls a function of `memtrace.launch.loaded` once that is loaded. After
the last one it is gone. A process that loads none of them, as a launcher does, pays a look at a name an import.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # what `typing` would say, which takes longer to load than all of this
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

AWAITED = {
    "torch": "torch",
    "torch._dynamo": "compiler",
    "transformers.trainer": "trainer",
    "swift.trainers.patcher": "swift",
}
"""The modules that are awaited, and the function that is called with each."""


class Finder:
    """Tells when modules were loaded, as part of their import.

    Args:
        awaited: their names, and the function that is called with each.
    """

    def __init__(self, awaited: Mapping[str, str]) -> None:
        self._awaited = dict(awaited)

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns what the other finders find for a name that is awaited, with a loader that tells; None for others."""
        if name not in self._awaited:
            return None
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                loader: Any = spec.loader
                if hasattr(loader, "exec_module"):
                    loader = _Loader(loader, self)
                    spec.loader = loader
                return spec
        return None

    def loaded(self, module: ModuleType) -> None:
        """Calls the function of a module that was loaded; after the last one this finder is taken off."""
        function = self._awaited.pop(module.__name__, None)
        if not self._awaited and self in sys.meta_path:
            sys.meta_path.remove(self)
        if function is not None:
            try:
                from memtrace.launch import loaded  # noqa: PLC0415 - not before there is something to do
            except ImportError as error:
                where = f"memtrace: what {sys.executable} trains is not traced: {error}\n"
                if sys.stderr is not None:
                    sys.stderr.write(where)
            else:
                loaded.call(function, module)


class _Loader:
    """Loads a module as its own loader does, which the module knows as its loader, and tells.

    Args:
        loader: the module's own.
        finder: is told.
    """

    def __init__(self, loader: Loader, finder: Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Returns what the module's own loader returns."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Runs the module's code, and tells that it is loaded."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.loaded(module)


def begin() -> None:
    """Takes this directory off the path, awaits what trains, and runs the `sitecustomize` that comes next."""
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 - pathlib takes longer than all of this
    sys.path[:] = [entry for entry in sys.path if entry != here]
    if os.environ.get("MEMTRACE_RUN", "0") not in ("", "0"):
        sys.meta_path.insert(0, Finder(AWAITED))
    for finder in sys.meta_path[:]:
        spec = None if isinstance(finder, Finder) else finder.find_spec("sitecustomize", None)
        if spec is not None and spec.loader is not None:
            following = type(sys)("sitecustomize")
            known = {"spec": spec, "loader": spec.loader, "file": spec.origin, "cached": spec.cached, "package": ""}
            vars(following).update({f"__{name}__": value for name, value in known.items()})
            sys.modules["sitecustomize"] = following  # it is what the script finds under the name
            spec.loader.exec_module(following)
            return


if __name__ == "sitecustomize":  # imported by Python at its start, by nobody else under this name
    begin()
