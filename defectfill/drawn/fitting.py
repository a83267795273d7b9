"""Trains a small model from scratch, in a way that goes on where it was killed."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from defectfill_dataset import derive_seed

from ..runs import checkpoint as checkpoints


def fit(
    name: str,
    objective: torch.nn.Module,
    batch_of: Callable[[], tuple],
    steps: int,
    learning_rate: float,
    work_dir: Path,
    seed: int,
) -> None:
    """Trains `objective` in place with AdamW, warm-up and cosine decay, and leaves the weights' moving average in it.

    Args:
        objective: a module whose forward returns the loss of a batch.
        batch_of: draws a batch; seeded anew at every step.
        work_dir: checkpoints go to `work_dir / name`; training goes on from the newest.
    """
    accelerator = Accelerator()
    if accelerator.device.type == "cuda":
        objective.to(accelerator.device, memory_format=torch.channels_last)
    folder = work_dir / name
    folder.mkdir(exist_ok=True)
    parameters = dict(objective.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=1e-3)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=min(200, steps // 10), num_training_steps=steps)
    average = EMAModel(parameters.values(), decay=0.9995, use_ema_warmup=True, power=3 / 4, foreach=True)
    step = 0
    last = checkpoints.find_checkpoint(folder, "latest")
    if last:
        weights = load_file(last / "weights.safetensors")
        state = checkpoints.restore(checkpoints.load(last, weights), parameters, optimizer, scheduler, None)
        average.load_state_dict(state["average"] | {"shadow_params": [weights[f"average {n}"] for n in parameters]})
        step = state["step"]
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    average.to(accelerator.device)
    progress = tqdm(total=steps, initial=step, desc=name, disable=not accelerator.is_main_process, mininterval=5)
    smooth = None
    while step < steps:
        torch.manual_seed(derive_seed(seed, name, step, accelerator.process_index))
        loss = prepared(*(x.to(accelerator.device) for x in batch_of()))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        average.step(parameters.values())
        step += 1
        smooth = loss.detach() if smooth is None else 0.99 * smooth + 0.01 * loss.detach()
        progress.update()
        if step % 50 == 0 or step == steps:  # no sooner: the device would wait
            if not smooth.isfinite():
                raise FloatingPointError(f"{name}: a loss up to step {step} is not finite")
            progress.set_postfix(loss=f"{smooth.item():.4f}", refresh=False)
        if accelerator.is_main_process and (step % 250 == 0 or step == steps):
            shadow = {f"average {n}": p for n, p in zip(parameters, average.shadow_params)}
            weights = {n: p.detach().cpu().contiguous() for n, p in {**parameters, **shadow}.items()}
            state = {k: v for k, v in average.state_dict().items() if k != "shadow_params"}
            checkpoints.save_checkpoint(
                folder, {"step": step, "identity": {}, "average": state},
                lambda path, weights=weights: save_file(weights, path / "weights.safetensors"),
                parameters, optimizer, scheduler, None, total_limit=2,
            )  # fmt: skip
    progress.close()
    average.copy_to(parameters.values())
