"""Several GPUs with the frozen base cut into shards, for models that are too large to be held whole by each."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lit_align.errors import UserError


class ShardedBase(DDPStrategy):
    """Data parallelism in which the ranks share one frozen base; FSDP's second generation, without its optimizer.

    Each layer of the base is cut into as many parts as there are ranks, is put together just before it computes, and
    cut again after it. What is trained, the adapters and whatever an objective adds, is small, and is held whole by
    every rank and kept in step as in plain data parallelism. So gradients, checkpoints, accumulation and the saved
    adapter are those of ``ddp``. Embeddings, the head and the norm before it stay whole as well, since the scorer reads
    them outside a forward pass.

    Every rank must run the layers equally often: completions may not be drawn during training, where each rank's end
    at another token. The base is loaded whole by each rank before it is cut.

    Args:
        kwargs: Arguments of Lightning's ``DDPStrategy``.
    """

    def model_to_device(self) -> None:
        """Cut the layers, then move what was not cut.

        Raises:
            UserError: If the policy draws data during training, the reference is cached, a reward is trained, or
                weights are in 8 bits.
        """
        module: Any = self.lightning_module
        if hasattr(module.trainer.datamodule, "sampling"):
            raise UserError(
                f"{type(module.trainer.datamodule).__name__} lets each rank draw completions of its own, and ranks "
                "that share one base must run it equally often: use --trainer.strategy ddp"
            )
        if module.pair_settings.reference_cache:
            raise UserError(
                "ranks that share one base must run it equally often, and model.pair.reference_cache saves each other "
                "passes: set it to false, or use --trainer.strategy ddp"
            )
        if not module.generates:
            raise UserError(
                f"{type(module).__name__} judges the validation completions when it is saved, on one rank alone, and "
                "ranks that share one base must run it equally often: use --trainer.strategy ddp"
            )
        super().model_to_device()
        if module.pair is not None:
            shard_layers(module.pair.base, self.root_device.type, self.world_size)

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        sharded = [name for name, value in model.named_parameters() if isinstance(value, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sharded)
        return super()._setup_model(model)


def shard_layers(base: Any, device: str, ranks: int) -> int:
    """Cut the frozen weights of each layer of a model; adapters in it stay whole.

    Args:
        base: The model of transformers, which names the classes of its layers.
        device: Type of the ranks' devices.
        ranks: How many there are; their process group is there.

    Returns:
        How many layers were cut.

    Raises:
        UserError: If the model has no known layers, or weights that cannot be cut.
    """
    from torch.distributed.fsdp import fully_shard

    kinds = set(base._no_split_modules or ())
    layers = [module for module in base.modules() if type(module).__name__ in kinds]
    if not layers:
        raise UserError(
            f"{type(base).__name__} does not name the class of its layers, so they cannot be shared between ranks: use "
            "--trainer.strategy ddp"
        )
    if any(type(module).__name__ == "Linear8bitLt" for module in base.modules()):
        raise UserError("int8 weights cannot be shared between ranks: set model.pair.quantization to nf4 or none")
    mesh = init_device_mesh(device, (ranks,))
    for layer in layers:
        adapters = {value for name, value in layer.named_parameters() if "lora_" in name}
        fully_shard(layer, mesh=mesh, ignored_params=adapters)
    return len(layers)
