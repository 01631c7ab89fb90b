"""An alignment stage: the safe model's new adapter is trained on a defender's data before the user's data come."""

from __future__ import annotations

import copy


def run_stage(trainer_class, model, tokenizer, data, args, lora, learning_rate: float, **kwargs):
    """One epoch over ``data`` under ``trainer_class`` -> the PEFT model, whose adapter the fine-tuning goes on with.

    ``args`` are those of the fine-tuning; the learning rate is the defender's, since the other may be the attacker's.
    """
    from safelab.training import ProgressBar

    args = copy.copy(args)
    args.learning_rate, args.num_train_epochs = learning_rate, 1
    args.save_strategy, args.signals_file = "no", None  # checkpoints and signals there are the fine-tuning's
    stage = trainer_class(model, args, data, processing_class=tokenizer, peft_config=lora, callbacks=[ProgressBar("alignment stage")], **kwargs)
    stage.train()
    return stage.model
