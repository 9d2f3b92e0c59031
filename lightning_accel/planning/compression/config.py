"""The config that reproduces a recipe from the command line."""

from collections.abc import Mapping
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import yaml  # type: ignore[import-untyped]  # no stubs

from lightning_accel.benchmarking.decision import Budgets
from lightning_accel.planning.compression.recipe import DISTILLATION, Recipe

RECIPE = "recipe.yaml"
_REPLACED = (  # callbacks of the user's config that a recipe replaces
    "ChannelPruning",
    "WeightPruning",
    "QuantizationAwareTraining",
    "PostTrainingQuantization",
    "ModelExport",
    "ExactResume",
    "InitialWeights",
    "ModelCheckpoint",
    "EarlyStopping",
)


def config_of(
    module: L.LightningModule, data: L.LightningDataModule, trainer: Mapping[str, Any] | None
) -> tuple[dict[str, Any], list[str]]:
    """The sections of a config that describe a run, as far as they are known from objects.

    Args:
        module: its arguments are known if it saved its hyper-parameters, or takes none.
        data: the same.
        trainer: arguments of the Trainer; ``None`` if they aren't known.

    Returns:
        The sections, and the names of those that the user has to add.
    """
    sections: dict[str, Any] = {}
    for name, value in (("model", module), ("data", data)):
        if (section := _section(value)) is not None:
            sections[name] = section
    plain = {key: value for key, value in (trainer or {}).items() if key != "callbacks" and _is_plain(value)}
    if trainer is not None and plain.keys() == trainer.keys() - {"callbacks"} and not trainer.get("callbacks"):
        sections["trainer"] = plain
    return sections, [name for name in ("model", "data", "trainer") if name not in sections]


def _section(value: Any) -> dict[str, Any] | None:
    """Class path and arguments of an object; ``None`` if they aren't known."""
    kind = type(value)
    path = f"{kind.__module__}.{kind.__qualname__}"
    takes = list(signature(kind).parameters)
    saved = {name: v for name, v in dict(getattr(value, "hparams", {})).items() if name in takes}
    importable = kind.__module__ != "__main__" and "<locals>" not in path
    if not importable or (takes and not saved) or not _is_plain(saved):
        return None
    return {"class_path": path, **({"init_args": saved} if saved else {})}


def _is_plain(value: Any) -> bool:
    """Whether YAML holds a value as it is."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(_is_plain(inner) for inner in value)
    return value is None or isinstance(value, bool | int | float | str)


def recipe_config(
    recipe: Recipe,
    sections: Mapping[str, Any],
    checkpoint: str,
    dirpath: str,
    export: Mapping[str, Any],
    budgets: Budgets,
) -> dict[str, Any]:
    """The config of a recipe.

    Args:
        recipe: what is done.
        sections: the user's ``model``, ``data`` and ``trainer``, as far as they are known.
        checkpoint: of the trained network.
        dirpath: the bundle's folder.
        export: arguments of the user's own ModelExport.
        budgets: what the bundle's default is chosen within.
    """
    config: dict[str, Any] = {"seed_everything": recipe.seed}
    config |= {name: sections[name] for name in ("model", "data") if name in sections}
    if recipe.distilled:
        network = config.get("model", {"class_path": "YOUR.MODULE"})
        arguments = {"student": network, "teacher": network, "teacher_checkpoint": checkpoint, **DISTILLATION}
        if isinstance(export.get("module"), str):
            arguments["outputs"] = export["module"]
        config["model"] = {"class_path": "lightning_accel.DistillationModule", "init_args": arguments}
    limits = {name: value for name, value in asdict(budgets).items() if value is not None}
    decided = {"budgets": limits, "benchmark": {"batches": [budgets.batch or 1], "callers": [1]}}
    exported = {
        **{k: v for k, v in export.items() if _is_plain(v)},
        **(decided if recipe.command != "quantize" else {}),
    }
    own = [c for c in sections.get("trainer", {}).get("callbacks") or [] if not _is_replaced(c)]
    callbacks = recipe.callbacks(checkpoint, dirpath, exported)
    trainer = {**sections.get("trainer", {}), "callbacks": [*callbacks[:-1], *own, callbacks[-1]]}
    config["trainer"] = trainer
    if recipe.trains:
        trainer["max_epochs"] = recipe.epochs
        return config
    config["ckpt_path"] = checkpoint
    if recipe.command == "quantize":
        config |= {"target": recipe.target, "effort": recipe.effort, "dirpath": dirpath, "engine": list(recipe.engines)}
    return config


def config_text(recipe: Recipe, config: Mapping[str, Any], path: str, missing: list[str]) -> str:
    """The text of a recipe's config; its first line is the command that runs it."""
    lines = [f"# lightning-accel {recipe.command} -c {path}", f"# {recipe.name}: found by `lightning-accel compress`."]
    if missing:
        lines.append(
            f"# Add the sections {', '.join(f'`{name}`' for name in missing)} of your own config, which objects in Python don't show "
            "(save_hyperparameters() does)."
        )
    text: str = yaml.dump(dict(config), Dumper=_NoAliases, sort_keys=False, allow_unicode=True)
    return "\n".join(lines) + "\n" + text


class _NoAliases(yaml.SafeDumper):  # type: ignore[misc]  # no stubs
    """Writes equal sections out in full."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always."""
        return True


def _is_replaced(section: Any) -> bool:
    path = str(section.get("class_path", "")) if isinstance(section, Mapping) else ""
    return path.rpartition(".")[2] in _REPLACED


def folder_of(dirpath: Path) -> str:
    """Where the config's bundle goes."""
    return str(dirpath / "reproduced")
