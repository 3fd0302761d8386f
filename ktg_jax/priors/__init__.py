"""Knowledge Representing: prior knowledge, from a teacher's parameters (KR, arXiv 1911.05329).

The paper's: a prior is the distribution of a teacher's *parameters*, aggregated into a more
abstract level; a sparse recoding penalty on the student's gradients decides what of it matters; it
combines with knowledge from logits. From its authors' patent (US 11106945 B2): the aggregation is a
downscaling layer on the teacher with the student's own kernel shape. No code of theirs is public
and we have read the abstract alone; everything more exact than that is our reading, each choice
a named option:

- aggregated is each resolution stage, not each layer, through an auxiliary head (`aggregate`), or
  without fitting, by SVD or clustering (`kernels`);
- the prior's loss compares normalised filters, index by index (`prior`), after the student started
  from the prior's or filters were assigned (`matching`);
- the penalty is a soft threshold at a quantile of the prior's gradient, with a dead-zone loss or an
  L1 recoding of filters as alternatives (`recoding`);
- a prior acts on any node of any graph, beside all its edges (`composition`).

Beside the kernels there is a reading that fits whole students: they begin as a part of the teacher
(`channels`), each stage learns to do what the teacher's does (`regression`), or what the rest of it
can go on from (`recast`), and the prior is all that comes of it (`whole_prior`).

Layers: recoding, stages, channels -> prior, pair, fitting -> matching, kernels, readers, files
-> aggregate, regression, recast, composition.
"""

from ktg_jax.graph.node import MATCHINGS, SCHEDULES
from ktg_jax.priors.aggregate import aggregate_prior, fit_readers
from ktg_jax.priors.channels import place_shapes, select_channels, select_start
from ktg_jax.priors.composition import NodePrior, with_priors
from ktg_jax.priors.files import PRIOR_FILE, about_prior, load_prior, save_prior
from ktg_jax.priors.fitting import FitPlan, FitState, Fitted, with_own_statistics
from ktg_jax.priors.kernels import cluster_prior, layer_prior, svd_prior
from ktg_jax.priors.matching import assigned, initialised, match_prior, started
from ktg_jax.priors.prior import (
    NORMALISATIONS,
    Prior,
    check_prior,
    normalised,
    prior_distance,
    prior_loss,
    recoding_loss,
    whole_prior,
)
from ktg_jax.priors.readers import (
    READERS_FILE,
    Readers,
    load_readers,
    projected,
    readers_checksum,
    save_readers,
)
from ktg_jax.priors.recast import recast_stages
from ktg_jax.priors.recoding import (
    dead_zone_loss,
    l1_recoding,
    recoding_threshold,
    soft_threshold,
    sparse_recoding,
)
from ktg_jax.priors.regression import regress_stages
from ktg_jax.priors.stages import (
    KernelShapes,
    layer_kernels,
    stage_convolutions,
    stage_kernels,
    stage_outputs,
)
from ktg_jax.stage_losses import attention_transfer_loss, feature_transfer_loss

__all__ = [
    "MATCHINGS",
    "NORMALISATIONS",
    "PRIOR_FILE",
    "READERS_FILE",
    "SCHEDULES",
    "FitPlan",
    "FitState",
    "Fitted",
    "KernelShapes",
    "NodePrior",
    "Prior",
    "Readers",
    "about_prior",
    "aggregate_prior",
    "assigned",
    "attention_transfer_loss",
    "check_prior",
    "cluster_prior",
    "dead_zone_loss",
    "feature_transfer_loss",
    "fit_readers",
    "initialised",
    "l1_recoding",
    "layer_kernels",
    "layer_prior",
    "load_prior",
    "load_readers",
    "match_prior",
    "normalised",
    "place_shapes",
    "prior_distance",
    "prior_loss",
    "projected",
    "readers_checksum",
    "recast_stages",
    "recoding_loss",
    "recoding_threshold",
    "regress_stages",
    "save_prior",
    "save_readers",
    "select_channels",
    "select_start",
    "soft_threshold",
    "sparse_recoding",
    "stage_convolutions",
    "stage_kernels",
    "stage_outputs",
    "started",
    "svd_prior",
    "whole_prior",
    "with_own_statistics",
    "with_priors",
]
