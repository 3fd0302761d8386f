"""Knowledge transfer graphs in JAX: train several networks together, each learning from the others.

Layers, lower ones knowing nothing of higher ones: io and cpu -> gates, losses, outputs, transfer
(arrays only) -> graph (the description) -> models -> training -> priors (of teachers' parameters).
"""

from ktg_jax.cpu.convolution import cpu_convolution
from ktg_jax.distillation_losses import (
    decoupled_kl_divergence,
    jensen_shannon_divergence,
    logit_distance,
    probability_cosine,
    smoothed_cross_entropy,
    standardised_kl_divergence,
)
from ktg_jax.edge_arrays import EdgeArrays
from ktg_jax.errors import InputError, RunError
from ktg_jax.gates import GATES, gate_coefficients, gate_names, gate_weights, register_gate
from ktg_jax.graph import named as graphs
from ktg_jax.graph.edge import Edge
from ktg_jax.graph.graph import Graph
from ktg_jax.graph.node import Node
from ktg_jax.inputs import Input
from ktg_jax.losses import cross_entropy, kl_divergence, reverse_kl_divergence
from ktg_jax.mixed import Mixed
from ktg_jax.models import build_model, model_names, register_model
from ktg_jax.models.foreign import load_state_dict, save_state_dict, state_dict_layout
from ktg_jax.models.linen_node import from_linen
from ktg_jax.models.network import NO_NETWORK, NodeFns
from ktg_jax.models.nnx_node import from_nnx
from ktg_jax.models.torch_module import from_torch
from ktg_jax.models.weights import load_node, save_node
from ktg_jax.named_losses import loss_names, per_sample, register_loss
from ktg_jax.outputs import Outputs
from ktg_jax.priors import (
    NodePrior,
    Prior,
    load_prior,
    match_prior,
    prior_distance,
    prior_loss,
    recast_stages,
    regress_stages,
    save_prior,
    select_channels,
    select_start,
    sparse_recoding,
    stage_kernels,
    whole_prior,
    with_own_statistics,
    with_priors,
)
from ktg_jax.recording import Header, Recording, RecordingWriter
from ktg_jax.relational_losses import contrastive_loss, correlation_loss, similarity_loss
from ktg_jax.space.space import SearchSpace
from ktg_jax.stage_losses import attention_transfer_loss, feature_transfer_loss
from ktg_jax.training.batches import Batches
from ktg_jax.training.delays import with_delays
from ktg_jax.training.evaluation import eval_step
from ktg_jax.training.forward import node_forward
from ktg_jax.training.gradients import graph_gradients
from ktg_jax.training.host_batches import BatchStream
from ktg_jax.training.optimizers import cosine_schedule, sgd, step_schedule
from ktg_jax.training.parallel import Parallel
from ktg_jax.training.record import record_host
from ktg_jax.training.state import GraphState, init_state
from ktg_jax.training.step import train_step
from ktg_jax.training.updates import node_update
from ktg_jax.transfer import edge_losses, graph_loss, node_losses

__version__ = "0.1.0"

__all__ = [
    "GATES",
    "NO_NETWORK",
    "BatchStream",
    "Batches",
    "Edge",
    "EdgeArrays",
    "Graph",
    "GraphState",
    "Header",
    "Input",
    "InputError",
    "Mixed",
    "Node",
    "NodeFns",
    "NodePrior",
    "Outputs",
    "Parallel",
    "Prior",
    "Recording",
    "RecordingWriter",
    "RunError",
    "SearchSpace",
    "attention_transfer_loss",
    "build_model",
    "contrastive_loss",
    "correlation_loss",
    "cosine_schedule",
    "cpu_convolution",
    "cross_entropy",
    "decoupled_kl_divergence",
    "edge_losses",
    "eval_step",
    "feature_transfer_loss",
    "from_linen",
    "from_nnx",
    "from_torch",
    "gate_coefficients",
    "gate_names",
    "gate_weights",
    "graph_gradients",
    "graph_loss",
    "graphs",
    "init_state",
    "jensen_shannon_divergence",
    "kl_divergence",
    "load_node",
    "load_prior",
    "load_state_dict",
    "logit_distance",
    "loss_names",
    "match_prior",
    "model_names",
    "node_forward",
    "node_losses",
    "node_update",
    "per_sample",
    "prior_distance",
    "prior_loss",
    "probability_cosine",
    "recast_stages",
    "record_host",
    "register_gate",
    "register_loss",
    "register_model",
    "regress_stages",
    "reverse_kl_divergence",
    "save_node",
    "save_prior",
    "save_state_dict",
    "select_channels",
    "select_start",
    "sgd",
    "similarity_loss",
    "smoothed_cross_entropy",
    "sparse_recoding",
    "stage_kernels",
    "standardised_kl_divergence",
    "state_dict_layout",
    "step_schedule",
    "train_step",
    "whole_prior",
    "with_delays",
    "with_own_statistics",
    "with_priors",
]
