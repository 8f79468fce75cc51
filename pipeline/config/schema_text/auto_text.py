"""How the values of keys are chosen that a job may leave to 'auto', in words for ``explain``.

Only keys whose description does not say it: those that `pipeline.config.auto_values` replaces
before the job is checked, so that the schema itself knows no 'auto' for them.
"""

from __future__ import annotations

_CROPS = "from the image size: below 96 pixels images are moved, not cut and resized"
# Last part of a key -> how its value is chosen. The run logs each value with its reason.
HOW_CHOSEN = {
    "image_size": "from the median short side of the images, within what the device computes in "
    "reasonable time",
    "stem_stride": "from the size of the images: small ones are not enlarged",
    "epochs": "from the number of training images, so that a run takes minutes on a CPU and hours "
    "on a GPU; fine-tuning is shorter",
    "global_batch": "from the number of training images and processes, as large as an epoch keeps "
    "enough steps",
    "warmup_epochs": "a tenth of the epochs",
    "eval_every_epochs": "so that a stage has about ten evaluations",
    "checkpoint_every_steps": "so that a stage has about ten checkpoints",
    "crop_scale": _CROPS,
    "crop_ratio": _CROPS,
    "crop_padding": _CROPS,
    "mixup": "from the epochs: the more often an image is shown, the stronger",
    "cutmix": "from the epochs: the more often an image is shown, the stronger",
    "validation_fraction": "from the number of images per class: of a small set a larger share is "
    "held out; not used if the source has a validation split",
}
