"""One process of the trainer's run on two that share the weights (``fsdp_worker.py MODELS OUTPUT``).

accelerate offers FSDP on GPUs only: on a CPU its state says plain data parallelism, whatever the configuration asks for.
:func:`allow_sharding` corrects that one answer; all the rest is theirs, from the shipped fsdp.yaml on: wrapping, the
optimiser's parameters, clipping, gathering of what is saved. torch's FSDP2 itself runs on a CPU over gloo.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from ddp_worker import trainable, trainer_of, update
from resume_worker import SETTINGS
from torch.distributed.tensor import DTensor

CONFIG = Path(__file__).parents[2] / "safelab" / "accelerate" / "fsdp.yaml"
CASES = ("llama3", "gemma3", "adapter-off", "full fine-tuning", "tied", "one held", "risk of the step")


def environment() -> dict[str, str]:
    """What ``accelerate launch --config_file fsdp.yaml`` tells its processes."""
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(CONFIG), "script.py"]))
    return {k: v for k, v in prepare_multi_gpu_env(args).items() if k.startswith(("FSDP_", "ACCELERATE_"))}


def allow_sharding() -> None:
    own = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:  # the Accelerator's own call, which is the first
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def sharded_update(case: str, models: Path, output: Path, **settings) -> dict[str, torch.Tensor]:
    trainer = trainer_of(case, models, output, **settings)
    change = update(trainer)
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters()), "the weights were not shared out"
    return change


def resumed(models: Path, output: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of a whole run, and of one that went on from the checkpoint after its fourth step; saves the first as a model."""

    def run():
        settings = SETTINGS | dict(per_device_train_batch_size=1, num_train_epochs=2, save_steps=4)
        trainer = trainer_of("llama3", models, output, **settings)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 8
        return trainer

    whole = run()
    whole.save_model(str(output / "saved"))
    if torch.distributed.get_rank() == 0:
        (output / "checkpoint-8" / "complete.json").unlink()
    torch.distributed.barrier()
    return {"whole": trainable(whole.model), "resumed": trainable(run().model)}


if __name__ == "__main__":
    models, output = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    os.environ |= environment()
    allow_sharding()
    results = {case: sharded_update(case, models, output, per_device_train_batch_size=4) for case in CASES}
    results["accumulated"] = sharded_update("llama3", models, output, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    results |= resumed(models, output / "run")
    torch.save(results, output / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
