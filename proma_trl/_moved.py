"""Keeps the names that modules had in version 0.1 importable."""

from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_MOVED = {
    "callbacks": "tools.callbacks",
    "config": "trainer.config",
    "data": "tools.data",
    "figures": "tools.figures",
    "model_card": "trainer.model_card",
    "policy_metrics": "tools.policy_metrics",
    "rewards": "tools.rewards",
    "runs": "tools.curves",
    "sampling": "trainer.sampling",
    "setup_checks": "trainer.setup_checks",
}


class MovedModules(MetaPathFinder, Loader):
    """
    Finds modules by their former names. They are the same objects under either name.

    Args:
        package (`str`): The package that they belong to.
    """

    def __init__(self, package: str):
        self._package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if package == self._package and name in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"{self._package}.{_MOVED[spec.name.rpartition('.')[2]]}")
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has given it the spec of its former name
        module.__spec__ = module.__spec__.loader_state
