"""Hyper-parameters of a student that was built from YAML inside of a :class:`DistillationModule`'s config."""

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import lightning as L


def _import(path: Any) -> Any:
    """What an import path names, or None."""
    if not isinstance(path, str):
        return None
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def keep_own_hparams_(student: L.LightningModule, wrapper: type) -> None:
    """Replace the config of the whole model, which ``LightningCLI`` gives to nested modules too, by the student's part.

    Without this the student's checkpoints could only be loaded where ``wrapper`` can be imported.

    Args:
        student: module whose ``save_hyperparameters`` ran under ``LightningCLI``; others are left alone.
        wrapper: class at the top of the config.
    """
    given = dict(student.hparams)
    top = _import(given.get("_class_path"))
    nested = given.get("student")
    if not (isinstance(top, type) and issubclass(top, wrapper) and isinstance(nested, dict) and "class_path" in nested):
        return
    own = {"_class_path": nested["class_path"], "_instantiator": given["_instantiator"]}
    own |= {**nested.get("init_args", {}), **nested.get("dict_kwargs", {})}
    student._set_hparams(own)
    student.remove_ignored_hparams([key for key in given if key not in own])
    object.__setattr__(student, "_hparams_initial", copy.deepcopy(student.hparams))


def nested_instantiator(cli: Any, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """An instantiator for ``LightningCLI`` that shows nested modules their own arguments, not the whole model's.

    A student may then read ``self.hparams.width`` in its constructor. To be registered before Lightning's own::

        def _add_instantiators(self):
            super()._add_instantiators()
            instantiator = nested_instantiator(self, _InstantiatorFn(cli=self, key="model"))
            self.parser.add_instantiator(instantiator, LightningModule, subclasses=True, prepend=True)

    Args:
        cli: the ``LightningCLI``.
        otherwise: instantiator of the model at the top of the config.
    """

    def instantiate(class_type: type, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
        cli._dump_config()
        model = cli.config_dump.get("model") or {}
        if "class_path" not in model or _import(model["class_path"]) is class_type:
            return otherwise(class_type, *args, applied_instantiation_links=applied_instantiation_links, **kwargs)
        return class_type(*args, **kwargs)

    return instantiate
