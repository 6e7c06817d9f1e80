"""Checkpoints: a model with AdamW's state, written and resumed from by the trainer's own code."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench.transfers import Tensors, owned
from trsd.checkpoint import Checkpointer, load_state
from trsd.model_shapes import config_of
from trsd.models import load_model, load_tokenizer, model_folder
from trsd.optim import build_optimizer

BUNDLED = "bundled:reasoner"


class TrainedModel:
    """A model with the state that AdamW has after a step, and the ways to keep both."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, model.device
        self.optimizer = _optimizer_of(model)
        self.tokenizer = load_tokenizer(model_folder(BUNDLED))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.tensors = held_tensors(model, self.optimizer)

    def save(self, folder: Path) -> Path:
        """A checkpoint in ``folder``, as the trainer writes it."""
        checkpointer = Checkpointer(folder, self.tokenizer, card=lambda step: "# A checkpoint to be measured\n")
        checkpointer.save(1, model=self.model, optimizer=self.optimizer, trainer={})
        return checkpointer.wait()

    def resume(self, checkpoint: Path) -> Tensors:
        """What a model and its optimizer hold that begin from a checkpoint, as the trainer begins from it."""
        model = load_model(checkpoint, dtype=torch.float32, device=str(self.device))
        optimizer = _optimizer_of(model)
        load_state(checkpoint, model=model, optimizer=optimizer)
        return owned(held_tensors(model, optimizer))


def trained_model(name: str, *, device: str, num_layers: int | None = None) -> TrainedModel:
    """The bundled reasoner, or the first layers of a Qwen3 shape of ``trsd.model_shapes``, random; in fp32."""
    if name == BUNDLED:
        return TrainedModel(load_model(model_folder(name), dtype=torch.float32, device=device))
    config = config_of(name)
    config.layer_types = config.layer_types[:num_layers]
    config.num_hidden_layers = len(config.layer_types)
    torch.manual_seed(0)
    with torch.device(device):
        return TrainedModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def _optimizer_of(model: PreTrainedModel) -> torch.optim.AdamW:
    return build_optimizer(model, learning_rate=1e-5, weight_decay=0.1)


def held_tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Tensors:
    """Weights and optimizer state where they are, by name."""
    state = {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    return {**model.state_dict(), **state}
