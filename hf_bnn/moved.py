"""Old import paths of modules that have moved. They work, with a DeprecationWarning, until version 0.2."""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_NN = "activations attention embeddings layers levels packed products scalar_levels finite fast_path direct_reads"
_TRAINING = "trainer checked_trainer preparation checkpoints precision batch_norm distillation teacher allocator"
MOVED = {f"hf_bnn.{name}": f"hf_bnn.nn.{name}" for name in _NN.split()}
MOVED |= {f"hf_bnn.{name}": f"hf_bnn.training.{name}" for name in _TRAINING.split()}
MOVED |= {
    "hf_bnn.methods.gradient_hook": "hf_bnn.methods.fsg.gradient_hook",
    "hf_bnn.methods.selective_scan": "hf_bnn.methods.fsg.nets",
    "hf_bnn.methods.unscaled_sign": "hf_bnn.methods.scaled_weight",
}
MOVED |= {"hf_bnn.training.jit_checkpoint": "hf_bnn.training.interruption"}
MOVED |= {"hf_bnn.tasks.images.splits": "hf_bnn.tasks.images.data"}
MOVED |= {"hf_bnn.training_arguments": "hf_bnn.training.arguments", "hf_bnn.quantizer": "hf_bnn.models.plug_in"}


class MovedModules(MetaPathFinder, Loader):
    """Imports the module at its new path for an import of the old path. Both names give the same module object."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The spec of a module that has moved; None for any other."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module at its new path, which keeps its own name and spec."""
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} has moved: import {new} instead", DeprecationWarning, stacklevel=2)
        # The import system writes the old path's spec into the module it gets, so a stand-in receives it.
        return _Alias(spec.name, importlib.import_module(new))

    def exec_module(self, module: ModuleType) -> None:
        """Replace the stand-in by the module itself."""
        sys.modules[module.__name__] = module.module


class _Alias(ModuleType):
    def __init__(self, name: str, module: ModuleType):
        super().__init__(name)
        self.module = module


def register() -> None:
    """Make the old paths importable."""
    sys.meta_path.append(MovedModules())
