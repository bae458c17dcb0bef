"""A run's tensors and counters as one record, and back: what must be equal for two runs to be the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddetr_cli.errors import CheckpointError
from ddetr_cli.train.checkpoints import Snapshot
from ddetr_cli.train.loop import Trainer
from ddetr_cli.train.run_state import RunState

MODEL, AVERAGE, OPTIMIZER = "model/", "average/", "optimizer/"


def snapshot(state: RunState, trainer: Trainer) -> Snapshot:
    """The run as it stands; its tensors are the live ones."""
    trainer.settle()
    state.steps_done, state.bad_in_a_row = trainer.steps_done, trainer.bad_in_a_row
    tensors: dict[str, Tensor] = {MODEL + name: tensor for name, tensor in trainer.model.state_dict().items()}
    if trainer.average is not None:
        state.average_steps = trainer.average.steps
        tensors |= {AVERAGE + name: tensor for name, tensor in trainer.average.state.items()}
    names = _parameter_names(trainer)
    for index, values in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"{OPTIMIZER}{names[index]}/{key}": value for key, value in values.items()}
    return Snapshot(tensors, {**state.to_dict(), "trained": names})


def snapshot_bytes(trainer: Trainer) -> int:
    """About how large a stored state is; the optimizer has two numbers for each it changes, after its first step."""
    copies = 2 if trainer.average is not None else 1
    model: int = sum(t.numel() * t.element_size() for t in trainer.model.state_dict().values())
    changed: int = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    return copies * model + 2 * changed


def restore(stored: Snapshot, trainer: Trainer, where: Path) -> RunState:
    """Put a stored state back into ``trainer``; returns the counters. Raises CheckpointError, naming ``where``.

    Tensors are copied into those of the model, wherever these lie and however they are laid out in memory.
    """
    facts = dict(stored.facts)
    names = _parameter_names(trainer)
    try:
        trained = facts.pop("trained")
        if trained != names:
            odd = sorted(set(trained) ^ set(names))[:5] or ["the same in another order"]
            raise CheckpointError(
                f"{where}: its optimizer belongs to another list of parameters ({', '.join(odd)}). "
                "Restore the run's config.json, or start a new run with --init."
            )
        state = RunState.from_dict(facts)
        trainer.model.load_state_dict(_below(stored, MODEL))
        if trainer.average is not None:
            trainer.average.restore(_below(stored, AVERAGE), state.average_steps)
        _restore_optimizer(_below(stored, OPTIMIZER), trainer, names)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}: belongs to another model ({str(error).splitlines()[0]}). "
            "Restore the run's config.json, or start a new run with --init."
        ) from error
    trainer.steps_done, trainer.bad_in_a_row = state.steps_done, state.bad_in_a_row
    return state


def _restore_optimizer(stored: dict[str, Tensor], trainer: Trainer, names: list[str]) -> None:
    values: dict[int, dict[str, Any]] = {}
    index_of = {name: index for index, name in enumerate(names)}
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    for full_name, tensor in stored.items():
        name, _, key = full_name.rpartition("/")
        parameter = parameters[index_of[name]]
        if tensor.dim():
            if tensor.shape != parameter.shape:
                raise ValueError(f"{full_name} has shape {list(tensor.shape)}, not {list(parameter.shape)}")
            # In the parameter's own memory layout: the fused step walks both side by side.
            tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
        values.setdefault(index_of[name], {})[key] = tensor
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.optimizer.load_state_dict({"state": values, "param_groups": groups})


def _parameter_names(trainer: Trainer) -> list[str]:
    """The names of what the optimizer changes, in its order."""
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return [names[id(parameter)] for group in trainer.optimizer.param_groups for parameter in group["params"]]


def _below(stored: Snapshot, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in stored.tensors.items() if name.startswith(prefix)}
