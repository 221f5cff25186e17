# SPDX-License-Identifier: Apache-2.0
"""Training: the loop, its schedules, and runs that can be interrupted and resumed exactly.

``train`` is the short way from pairs of strings to a translator; the command line builds
the same ``Trainer`` from files.
"""

from .judging import AnyExamples, accuracy, device_of, errors_by_position, mean_loss
from .options import (
    FREE_ON_RESUME,
    LABELER_TOKENS,
    OPTIMIZERS,
    SCHEDULES,
    SELECTIONS,
    TASKS,
    LabelerOptions,
    ModelOptions,
    OptimizerName,
    ScheduleName,
    SelectName,
    TaskName,
    TrainingOptions,
)
from .reports import EpochReport
from .resuming import begun_options
from .runs import (
    Data,
    held_model,
    last_checkpoint,
    resume,
    start,
    start_labeler,
    tokenise_labels,
)
from .short import train, train_labeler
from .signals import Interrupted
from .trainer import LAST, Trainer
from .updates import learning_rate_factor, training_step

__all__ = [
    "FREE_ON_RESUME",
    "LABELER_TOKENS",
    "LAST",
    "OPTIMIZERS",
    "SCHEDULES",
    "SELECTIONS",
    "TASKS",
    "AnyExamples",
    "Data",
    "EpochReport",
    "Interrupted",
    "LabelerOptions",
    "ModelOptions",
    "OptimizerName",
    "ScheduleName",
    "SelectName",
    "TaskName",
    "Trainer",
    "TrainingOptions",
    "accuracy",
    "begun_options",
    "device_of",
    "errors_by_position",
    "held_model",
    "last_checkpoint",
    "learning_rate_factor",
    "mean_loss",
    "resume",
    "start",
    "start_labeler",
    "tokenise_labels",
    "train",
    "train_labeler",
    "training_step",
]
