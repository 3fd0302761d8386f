"""Networks that are trained already, to be used as they are: those of a run, or one of a file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import ktg_jax as ktg
from ktg_jax.errors import InputError, RunError
from ktg_jax.inputs import Input, parsed_input, resolved_input
from ktg_jax.io.trees import unflatten
from ktg_jax.models import check_network
from ktg_jax.models.foreign import is_foreign, state_dict_layout
from ktg_jax.models.input import check_channels, with_input
from ktg_jax.models.network import NodeFns, PyTree
from ktg_jax.models.streams import without_stream
from ktg_jax.models.weights import NodeWeights, read_node
from ktg_jax.training.checkpoint_reading import best_checkpoint, checkpoint_epochs, read_nodes
from ktg_jax.training.state import GraphState
from ktg_jax.training.warm_start import load_weights, run_inputs

from .results import best_epoch
from .workdir import Workdir


@dataclass(frozen=True)
class Trained:
    """Networks and their weights, recorded nodes and ensembles left out.

    Attributes:
        names: the names of the nodes.
        models: the names of their models.
        node_fns: their functions, of images in 0..1.
        state: their weights, without optimisers.
        inputs: how each wants its images; of a file that does not say it, what was given.
        epoch: that the weights are of; None: of a file.
        layout: of a state dict of PyTorch, the name of its layout.
        target: the index of the target; None: it is an ensemble.
    """

    names: tuple[str, ...]
    models: tuple[str, ...]
    node_fns: tuple[NodeFns, ...]
    state: GraphState
    inputs: tuple[Input, ...]
    epoch: int | None = None
    layout: str | None = None
    target: int | None = 0

    def index(self, name: str | None) -> int:
        """The index of a node; without a name, of the target.

        Raises:
            InputError: there is none of that name.
        """
        if name is not None and name not in self.names:
            raise InputError("node", name, ", ".join(self.names))
        if name is None and self.target is None:
            raise InputError("node", name, f"{', '.join(self.names)}: the target is an ensemble")
        return 0 if name is None else self.names.index(name)

    def said(self, path: str) -> str | None:
        """What is to be said of a file that was recognised; None: it said all itself."""
        if self.layout is None:
            return None
        return f"{path} is a {self.models[0]} in PyTorch's layout {self.layout}."


def trained_run(workdir: Workdir, checkpoint: str) -> Trained:
    """The networks of a run, as it knows them; those of other classes than its data's left out.

    Args:
        workdir: its folder, and the modules that it imports are imported.
        checkpoint: `last` or `best`.

    Raises:
        InputError: a model that is not registered, or no best checkpoint.
        RunError: no checkpoint that can be read.
    """
    graph, run = workdir.graph, workdir.config
    kept = [
        i
        for i, node in enumerate(graph.nodes)
        if node.kind in ("network", "average") and node.classes is None
    ]
    nodes, models = [graph.nodes[i] for i in kept], [graph.model_of(i) for i in kept]
    facts, inputs = run["data_facts"], run_inputs(workdir.path, graph)
    dtype = jnp.bfloat16 if run["mixed_precision"] else jnp.float32
    node_fns = [ktg.build_model(model, facts["classes"], dtype=dtype) for model in models]
    wanted = [inputs[str(node.name)] for node in nodes]
    node_fns = [_seeing(fns, each) for fns, each in zip(node_fns, wanted, strict=True)]
    epoch, stored = read_nodes(workdir.checkpoints, _epoch(workdir, checkpoint))
    params, model_state = [], []
    for node, fns in zip(nodes, node_fns, strict=True):
        found, where = stored[str(node.name)], f"checkpoint of {node.name}"
        made = _unflattened(fns, found["params"], found["model_state"], facts["image_shape"], where)
        params.append(made[0])
        model_state.append(made[1])
    return Trained(
        tuple(str(node.name) for node in nodes),
        tuple(models),
        tuple(node_fns),
        _state(params, model_state),
        tuple(wanted),
        epoch,
        target=0 if 0 in kept else None,
    )


def trained_file(
    path: str,
    model: str | None,
    given: str | None,
    *,
    num_classes: int,
    image_shape: Sequence[int],
) -> Trained:
    """The network of a file of our own or of a PyTorch state dict.

    Args:
        path: the `.safetensors` file.
        model: its name; None: the file is to say it.
        given: how it wants its images, as a command line has it; None: as the file says, or 0..1.
        num_classes: that the data has.
        image_shape: `(H, W, C)` of the data.

    Raises:
        InputError: a file that cannot be read or understood, or that is of another model, of other
            classes, or of other images.
    """
    wanted = None if given is None else resolved_input(parsed_input("input", given))
    size = None if wanted is None else wanted.size
    height, width, channels = image_shape
    source = os.path.expanduser(path)
    weights, shape = file_weights(path, model, (size or height, size or width, channels))
    if shape is not None and tuple(shape[:2]) != (height, width):
        raise InputError("image_size", height, f"{shape[0]}, of the network's own images")
    if weights.input is not None:
        if wanted not in (None, weights.input):
            allowed = f"nothing: the file says it ({weights.input.to_json()})"
            raise InputError("input", given, allowed)
        wanted = weights.input
    wanted = wanted or Input()
    check_channels("input", wanted, channels)
    fns = _seeing(ktg.build_model(weights.model, num_classes), wanted)
    check_network(
        fns, weights.model, num_classes=num_classes, image_shape=image_shape, batch_size=1
    )
    where = f"weights of {path}"
    made = _unflattened(fns, weights.params, weights.model_state, image_shape, where)
    return Trained(
        (Path(path).stem,),
        (weights.model,),
        (fns,),
        _state([made[0]], [made[1]]),
        (wanted,),
        layout=None if shape is not None else state_dict_layout(source, weights.model),
    )


def file_weights(
    path: str, model: str | None, image_shape: Sequence[int]
) -> tuple[NodeWeights, Sequence[int] | None]:
    """The weights of a file, and the shape of its images (None: it does not say it).

    Arguments and errors are those of `trained_file`; the shape is that which the network sees.
    """
    source = os.path.expanduser(path)
    if is_foreign(source):
        if model is None:
            raise InputError("model", None, f"the name of the model that {path} is of")
        return load_weights(path, model, image_shape), None
    weights, about = read_node(source)
    if model not in (None, weights.model):
        raise InputError("model", model, f"{weights.model}, which the file is of")
    return weights, about["image_shape"]


def _seeing(fns: NodeFns, wanted: Input) -> NodeFns:
    return fns if wanted == Input() else with_input(fns, wanted)


def _epoch(workdir: Workdir, checkpoint: str) -> int | None:
    """The epoch of the checkpoint; None: the newest one."""
    if checkpoint == "last":
        return None
    newest = max(checkpoint_epochs(workdir.checkpoints), default=0)
    try:
        wanted = best_epoch(workdir.records(up_to_epoch=newest))
    except RunError:  # metrics.jsonl is damaged
        wanted = best_checkpoint(workdir.checkpoints)
    if wanted is None:
        raise InputError("checkpoint", checkpoint, "last: the run had no validation images")
    return wanted


def _unflattened(
    fns: NodeFns, params: Any, model_state: Any, image_shape: Sequence[int], where: str
) -> tuple[PyTree, PyTree]:
    """Params and model state in the form that the network's functions take."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    template = jax.eval_shape(fns.init, jax.random.key(0), images)
    state = unflatten(without_stream(template[1]), without_stream(model_state or {}), where)
    return unflatten(template[0], params or {}, where), state


def _state(params: Sequence[PyTree], model_state: Sequence[PyTree]) -> GraphState:
    none = (None,) * len(params)
    return GraphState(tuple(params), tuple(model_state), none, jnp.zeros((), jnp.int32))
