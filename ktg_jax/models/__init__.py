"""Networks by name, as flax.linen modules."""

from ktg_jax.models.check import check_network
from ktg_jax.models.cnn import CNN
from ktg_jax.models.projected_resnet import ProjectedResNet
from ktg_jax.models.registry import build_model, check_model, model_names, register_model
from ktg_jax.models.resnet import ResNet
from ktg_jax.models.wide_resnet import WideResNet

__all__ = [
    "CNN",
    "ProjectedResNet",
    "ResNet",
    "WideResNet",
    "build_model",
    "check_model",
    "check_network",
    "model_names",
    "register_model",
]
