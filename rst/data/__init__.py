"""Data sets, in memory or streamed, and the batched augmentation that feeds a training step."""

from rst.data.augment import Augment, normalize
from rst.data.batches import evaluation_batches, steps_per_epoch, train_batches
from rst.data.cifar import cifar10, cifar100
from rst.data.digits import digits
from rst.data.image_folder import image_folder
from rst.data.imagenet import imagenet
from rst.data.images import ImageData

__all__ = [
    "Augment",
    "ImageData",
    "cifar10",
    "cifar100",
    "digits",
    "evaluation_batches",
    "image_folder",
    "imagenet",
    "normalize",
    "steps_per_epoch",
    "train_batches",
]
