"""Decides how each layer of a model is followed."""

import sys

from torch import nn
from transformers import PreTrainedModel

from . import linear
from .embedding import EmbeddingLayer, embedding_refusal
from .experts import ExpertsLayer, is_experts
from .layer import ONE_SEQUENCE, Layer
from .norm import BroadcastLayer, broadcasts_parameters
from .registry import RuleLayer, rule_for


def plan_layers(model: nn.Module) -> list[Layer]:
    """
    How each layer that holds trainable parameters is followed.

    Raises:
        ValueError: If some layers don't yield sequence gradients, with their names, reasons and ways out.
    """
    layers: list[Layer] = []
    followed: set[nn.Parameter] = set()
    without_rule = []
    foreign = _foreign_modules(model)
    for name, module in model.named_modules():
        params = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
        if not params:
            continue
        layer = foreign.get(module) or _layer_for(name, module, tuple(params))
        if isinstance(layer, str):
            line = f"`{name or 'the model itself'}` ({type(module).__name__}): {layer}"
            without_rule.append((params, line))
        else:
            followed.update(params.values())
            layers.append(layer)
    # A module may hold only an alias of a parameter that another layer works with
    refused = [line for params, line in without_rule if not followed.issuperset(params.values())]
    if refused:
        shown = "\n".join(f"  - {line}" for line in refused[:8])
        more = f"\n  - and {len(refused) - 8} more" if len(refused) > 8 else ""
        raise ValueError(
            "PROMA needs the gradient of each sequence in a microbatch, and some layers that hold trainable "
            f"parameters don't yield it:\n{shown}{more}\nEither register a rule for the layer's class "
            f"(`proma_trl.register_rule`, one small function), or train with {ONE_SEQUENCE}, or freeze those "
            "parameters."
        )
    return layers


def plan_linear_layers(model: nn.Module, head: bool) -> list[Layer]:
    """
    How the layers are followed whose weight is a matrix that they multiply by. Other layers are left to autograd.

    A weight that is also an embedding's is followed in both, or not at all.

    Args:
        model (`nn.Module`): The model.
        head (`bool`): Whether the LM head is among them.
    """
    foreign, excluded = _foreign_modules(model), set() if head else set(head_weights(model))
    layers: list[Layer] = []
    embeddings: dict[nn.Parameter, list[tuple[str, nn.Embedding]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            embeddings.setdefault(module.weight, []).append((name, module))
        if is_experts(module) and module not in foreign:
            layers.append(ExpertsLayer(name, module))
            continue
        weight = getattr(module, "weight", None)
        if module in foreign or weight in excluded or not (isinstance(weight, nn.Parameter) and weight.requires_grad):
            continue
        rule = linear.rule_if_linear(module)
        if rule is not None:
            params = tuple(n for n, p in module.named_parameters(recurse=False) if p.requires_grad)
            layers.append(RuleLayer(name, module, params, rule))
    for weight, modules in embeddings.items():
        tied = [layer for layer in layers if any(matrix is weight for matrix in layer.matrices)]
        if tied and any(embedding_refusal(module) for _, module in modules):
            layers = [layer for layer in layers if layer not in tied]
        elif tied:
            layers += [EmbeddingLayer(name, module, ("weight",)) for name, module in modules]
    return layers


def head_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weight of a model's LM head, as far as it is known to have one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    weight = getattr(head, "weight", None)
    return [weight] if isinstance(weight, nn.Parameter) else []


def _foreign_modules(model: nn.Module) -> dict[nn.Module, str]:
    """
    Modules of a model whose inputs are not one entry a sequence, or whose parameters other modules multiply, and why:
    all that a multimodal model has outside its text decoder, and what PEFT's `ParamWrapper` holds.
    """
    found: dict[nn.Module, str] = {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if isinstance(base, PreTrainedModel) and config.get_text_config(decoder=True) is not config:
        text = {*base.get_decoder().modules()}
        for embedding in (base.get_output_embeddings(), base.get_input_embeddings()):
            text.update(() if embedding is None else embedding.modules())
        why = "runs outside the text decoder, so that it isn't known which sequence an image (or its patch) belongs to"
        found |= {module: why for module in base.modules() if module not in text}
    peft_layers = sys.modules.get("peft.tuners.lora.layer")
    for wrapper in model.modules() if peft_layers is not None else ():
        if isinstance(wrapper, peft_layers.ParamWrapper):
            why = f"PEFT's `ParamWrapper` multiplies its weights to change `{wrapper.parameter_name}`"
            adapters = (getattr(wrapper, name) for name in wrapper.adapter_layer_names)
            found |= {module: why for adapter in adapters for module in adapter.modules()}
    return found


def _layer_for(name: str, module: nn.Module, names: tuple[str, ...]) -> Layer | str:
    """How a module with the trainable parameters `names` is followed, or why it can't be."""
    if isinstance(module, nn.Embedding):
        refusal = embedding_refusal(module)
        if refusal is None and names != ("weight",):
            refusal = "it holds more than a weight"
        return refusal or EmbeddingLayer(name, module, names)
    rule = rule_for(module)
    if rule is not None:
        return RuleLayer(name, module, names, rule)
    if broadcasts_parameters(module):
        return BroadcastLayer(name, module, names)
    return f"holds {', '.join(f'`{n}`' for n in names)} and has no rule"
