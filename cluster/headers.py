"""What the controller must know of a checkpoint before anything is loaded: its headers say it."""

from cluster.config import ServeConfig
from cluster.living import Sizes


def read_headers(config: ServeConfig) -> tuple[Sizes, str]:
    """What is to be placed, and a sample of the weights. Runs where the folder is.

    Raises ModelError.
    """
    # torch is not wanted before a replica runs
    from model.weights import Checkpoint, torch_dtype

    folder, dtype = config.checkpoint_folder(), torch_dtype(config.dtype)
    modes = config.worker_quantization[: config.num_workers]
    as_held = {
        mode: Checkpoint(folder, dtype=dtype, expert_quantization=mode) for mode in set(modes)
    }
    model = as_held[modes[0]].config
    sizes = Sizes(
        num_layers=model.num_hidden_layers,
        num_experts=model.num_local_experts,
        expert_bytes=tuple(as_held[mode].expert_bytes for mode in modes),
        budgets=(config.worker_memory_bytes,) * config.num_workers,
        num_copies=config.expert_copies,
        num_slices=config.expert_slices,
    )
    return sizes, as_held[modes[0]].sample()
