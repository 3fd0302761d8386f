"""Networks by name, as flax.linen modules."""

from ktg_jax.models.check import check_network
from ktg_jax.models.cnn import CNN
from ktg_jax.models.mobile import MobileNetV2, ShuffleNetV2
from ktg_jax.models.projected_resnet import ProjectedResNet
from ktg_jax.models.registry import build_model, check_model, model_names, register_model
from ktg_jax.models.resnet import ResNet
from ktg_jax.models.vgg import VGG
from ktg_jax.models.vit import ViT
from ktg_jax.models.wide_resnet import WideResNet

__all__ = [
    "CNN",
    "VGG",
    "MobileNetV2",
    "ProjectedResNet",
    "ResNet",
    "ShuffleNetV2",
    "ViT",
    "WideResNet",
    "build_model",
    "check_model",
    "check_network",
    "model_names",
    "register_model",
]
