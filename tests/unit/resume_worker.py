"""A training run that can be killed: ``resume_worker.py MODEL OUTPUT KILL_AT_STEP`` (0: not at all)."""

import os
import signal
import sys

import torch
from ddp_worker import make_trainer, trainable
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

SETTINGS = dict(
    optim="adamw_torch", learning_rate=5e-3, lr_scheduler_type="linear", max_grad_norm=1.0, num_train_epochs=3, per_device_train_batch_size=2,
    granularity="batch", risk_smoothing=0.5, save_strategy="steps", save_steps=2, save_total_limit=2, random_b=False,
)  # fmt: skip


class Kill(TrainerCallback):
    """As ``kill -9`` does: nothing is cleaned up."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(model, output, *callbacks):
    """Train from the last complete checkpoint in ``output``, if any; the trainer."""
    net, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    trainer = make_trainer(net, tokenizer, output, callbacks=list(callbacks), signals_file=f"{output}/signals.jsonl", **SETTINGS)
    trainer.train(resume_from_checkpoint=True)
    return trainer


if __name__ == "__main__":
    model, output, step = sys.argv[1:]
    torch.set_num_threads(1)
    save_file(trainable(run(model, output, Kill(int(step))).model), f"{output}/final.safetensors")
