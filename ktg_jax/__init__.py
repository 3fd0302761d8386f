"""Knowledge transfer graphs in JAX: train several networks together, each learning from the others.

Layers, lower ones knowing nothing of higher ones: gates and losses (arrays only) -> graph (the
description) -> nodes and models -> state and step -> data, devices, checkpoints; representing
(priors from a teacher's parameters) stands on models, step and data, search on graphs.
"""

from ktg_jax import graphs
from ktg_jax.convolution import cpu_convolution
from ktg_jax.errors import InputError, RunError
from ktg_jax.gates import GATES, gate_weights
from ktg_jax.graph import Graph
from ktg_jax.graph_node import Node
from ktg_jax.linen_node import from_linen
from ktg_jax.losses import cross_entropy, edge_losses, graph_loss, kl_divergence, node_losses
from ktg_jax.models import build_model, model_names, register_model
from ktg_jax.nnx_node import from_nnx
from ktg_jax.nodes import NodeFns
from ktg_jax.optimizers import cosine_schedule, sgd, step_schedule
from ktg_jax.parallel import Parallel
from ktg_jax.representing import (
    NodePrior,
    Prior,
    aggregate_prior,
    load_prior,
    match_prior,
    prior_distance,
    prior_loss,
    save_prior,
    sparse_recoding,
    stage_kernels,
    svd_prior,
    with_priors,
)
from ktg_jax.search import SearchSpace
from ktg_jax.stage_losses import EdgeWeights, attention_transfer_loss, feature_transfer_loss
from ktg_jax.state import GraphState, init_state
from ktg_jax.step import eval_step, graph_gradients, node_forward, train_step
from ktg_jax.updates import node_update
from ktg_jax.weights import load_node, save_node

__version__ = "0.1.0"

__all__ = [
    "GATES",
    "EdgeWeights",
    "Graph",
    "GraphState",
    "InputError",
    "Node",
    "NodeFns",
    "NodePrior",
    "Parallel",
    "Prior",
    "RunError",
    "SearchSpace",
    "aggregate_prior",
    "attention_transfer_loss",
    "build_model",
    "cosine_schedule",
    "cpu_convolution",
    "cross_entropy",
    "edge_losses",
    "eval_step",
    "feature_transfer_loss",
    "from_linen",
    "from_nnx",
    "gate_weights",
    "graph_gradients",
    "graph_loss",
    "graphs",
    "init_state",
    "kl_divergence",
    "load_node",
    "load_prior",
    "match_prior",
    "model_names",
    "node_forward",
    "node_losses",
    "node_update",
    "prior_distance",
    "prior_loss",
    "register_model",
    "save_node",
    "save_prior",
    "sgd",
    "sparse_recoding",
    "stage_kernels",
    "step_schedule",
    "svd_prior",
    "train_step",
    "with_priors",
]
