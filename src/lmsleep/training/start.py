"""What a run begins with."""

from lmsleep.backbones import Model, build, kind_in, kind_of
from lmsleep.tasks.reading import check_known
from lmsleep.training.config import RunConfig, TrainConfig
from lmsleep.training.runs import RunFolder


def first_model(config: RunConfig, *, bfloat16: bool = False, trust: bool = False) -> Model:
    """Build the model of a run: random weights, those of another run or model, or a pretrained model.

    Args:
        config: the run.
        bfloat16: the model will run under autocast to bfloat16.
        trust: run the Python files that a model to start from names.

    Raises:
        FileNotFoundError: if there is no model at `config.train.start`, or no pretrained one.
        ValueError: if it does not fit.
    """
    model, start = build(config.model, bfloat16=bfloat16), config.train.start
    check_known(config.task, config.task_name, model.vocab_size)
    # Only a built model shows what a sleep could write to; one row is enough.
    config.sleep.consolidator.check_model(model)
    config.sleep.check(model.initial_state(1).memory)
    config.sleep.eviction.check(model)
    if start is not None:
        folder = RunFolder(start, trust=trust)
        # On the CPU: weights are copied from it, and the trainer moves the model later.
        with folder.naming_code():
            source = folder.model() if folder.is_run() else kind_in(start).open(start, "cpu")[0]
        kind_of(config.model).take_weights(model, source, config.train.inserted)
    return model


def trained_weights(model: Model, train: TrainConfig) -> Model:
    """Freeze what a run does not train; return the model."""
    # First all frozen (the call returns the model), then the inserted blocks thawed.
    if train.only_inserted:
        for i, block in enumerate(model.requires_grad_(False).blocks):
            block.requires_grad_(i in train.inserted)
    return model
