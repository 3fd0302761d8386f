"""Knowledge Representing: prior knowledge, from a teacher's parameters (KR, arXiv 1911.05329).

The paper's: a prior is the distribution of a teacher's *parameters*, aggregated into a more
abstract level; a sparse recoding penalty on the student's gradients decides what of it matters; it
combines with knowledge from logits. From its authors' patent (US 11106945 B2): the aggregation is a
group of downscaling layers on the teacher, of the student's own shapes. No code of theirs is public
and we have read the abstract alone; everything more exact than that is our reading, each choice
a named option:

- aggregated is each resolution stage, into the student's own stage, which learns to do what the
  teacher's does (`regression`), or what the rest of the teacher can go on from (`recast`); it
  begins as a part of the teacher, its channels chosen consistently (`channels`);
- the prior is the whole student that comes of it: the student starts from all its parameters and
  statistics (`matching`), and every convolution has the prior's loss, which compares normalised
  filters (`prior`), or all filters of a kernel as a distribution (`distribution`);
- the penalty is a soft threshold at a quantile of the prior's gradient, with a dead-zone loss, an
  L1 recoding of filters and a penalty on the task's own gradient as alternatives (`recoding`);
- a prior acts on any node of any graph, beside all its edges (`composition`).

A former reading, single kernels that were fitted through an averaging head and put into random
surroundings, does harm (docs/cifar10-ablation).

Layers: recoding, stages, channels -> prior, pair, fitting -> matching, distribution, files ->
regression, recast, composition.
"""

from ktg_jax.graph.node import MATCHINGS, PRIOR_KINDS, SCHEDULES
from ktg_jax.priors.channels import place_shapes, select_channels, select_start
from ktg_jax.priors.composition import NodePrior, with_priors
from ktg_jax.priors.distribution import distribution_distance
from ktg_jax.priors.files import PRIOR_FILE, about_prior, load_prior, save_prior
from ktg_jax.priors.fitting import FitPlan, FitState, Fitted, with_own_statistics
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
    stage_convolutions,
    stage_kernels,
    stage_outputs,
)
from ktg_jax.stage_losses import attention_transfer_loss, feature_transfer_loss

__all__ = [
    "MATCHINGS",
    "NORMALISATIONS",
    "PRIOR_FILE",
    "PRIOR_KINDS",
    "SCHEDULES",
    "FitPlan",
    "FitState",
    "Fitted",
    "KernelShapes",
    "NodePrior",
    "Prior",
    "about_prior",
    "assigned",
    "attention_transfer_loss",
    "check_prior",
    "dead_zone_loss",
    "distribution_distance",
    "feature_transfer_loss",
    "initialised",
    "l1_recoding",
    "load_prior",
    "match_prior",
    "normalised",
    "place_shapes",
    "prior_distance",
    "prior_loss",
    "recast_stages",
    "recoding_loss",
    "recoding_threshold",
    "regress_stages",
    "save_prior",
    "select_channels",
    "select_start",
    "soft_threshold",
    "sparse_recoding",
    "stage_convolutions",
    "stage_kernels",
    "stage_outputs",
    "started",
    "whole_prior",
    "with_own_statistics",
    "with_priors",
]
