"""Answers `import lmcache` with lmcache_rs where no real LMCache is installed."""

# Runs at the start of every Python of the environment: imports nothing that Python has not loaded by then.
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_PACKAGES = ("lmcache", "lmcache.v1", "lmcache.integration", "lmcache.integration.vllm")
_MODULES = ("lmcache.v1.cache_engine", "lmcache.v1.config", "lmcache.integration.vllm.utils")


class _Loader:
    """Makes a module that forwards to the one of the same name in lmcache_rs.

    A module of its own, not the other under a second name: Python would write the second name's spec into it.
    """

    is_lmcache_rs = True

    def create_module(self, spec: "ModuleSpec") -> None:
        """Leave it to Python to make an empty module."""

    def exec_module(self, module: "ModuleType") -> None:
        """Fill the module with what forwards."""
        import importlib

        target = importlib.import_module(module.__name__.replace("lmcache", "lmcache_rs", 1))
        names = [*getattr(target, "__all__", ())]

        def forward(name: str) -> "Any":
            if name in names:
                return getattr(target, name)
            raise AttributeError(f"module {module.__name__!r} (from lmcache_rs) has no attribute {name!r}")

        vars(module).update(__all__=names, __getattr__=forward, __dir__=lambda: names, __doc__=target.__doc__)
        vars(module)["__lmcache_rs__"] = True


class _Finder:
    """The last to be asked for a module."""

    is_lmcache_rs = True

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Find `lmcache` when nobody else does, and below it what lmcache_rs provides.

        Also below a mere folder of that name, which Python takes for a package.
        """
        if name == "lmcache":
            return self._asked_later(path, target) or (_spec(name) if _has_lmcache_rs() else None)
        above = sys.modules.get("lmcache") if name.startswith("lmcache.") else None
        if not (is_shim(above) or _is_folder(above)):
            return None
        if name in _PACKAGES or name in _MODULES:
            return _spec(name)
        raise ModuleNotFoundError(
            f"No module named {name!r}: this is lmcache_rs in the place of LMCache, and provides only"
            f" {', '.join(_MODULES)}; uninstall lmcache-rs-compat and install lmcache for the rest",
            name=name,
        )

    def _asked_later(self, path: "Sequence[str] | None", target: "ModuleType | None") -> "ModuleSpec | None":
        """Ask the finders behind us: an editable installation of a real LMCache may come after."""
        finders = sys.meta_path
        behind = finders[finders.index(self) + 1 :] if self in finders else []
        for finder in behind:
            spec = finder.find_spec("lmcache", path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                return spec
        return None


def _spec(name: str) -> "ModuleSpec":
    from importlib.machinery import ModuleSpec

    return ModuleSpec(name, _Loader(), origin="lmcache_rs", is_package=name in _PACKAGES)  # type: ignore[arg-type]


def _has_lmcache_rs() -> bool:
    from importlib.util import find_spec

    return find_spec("lmcache_rs") is not None


def _is_folder(module: "ModuleType | None") -> bool:
    spec = getattr(module, "__spec__", None)
    return spec is not None and spec.origin is None and spec.submodule_search_locations is not None


def install() -> None:
    """Append the finder, once."""
    if not any(getattr(finder, "is_lmcache_rs", False) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def is_shim(what: "ModuleSpec | ModuleType | str | None") -> bool:
    """Tell whether a module, a spec or what a name would import is from here, not from a real LMCache."""
    if isinstance(what, str):
        from importlib.util import find_spec

        try:
            what = find_spec(what)
        except (ImportError, ValueError):
            return False
    spec = getattr(what, "__spec__", what)
    return bool(getattr(getattr(spec, "loader", None), "is_lmcache_rs", False))
